"""All that only a GPU can tell, in one command: ``python benchmarks/gpu.py FOLDER`` (``make gpu``).

Makes a checkpoint of Stable Diffusion v1-4's size with random weights, builds every engine that
this machine can, and asks of each whether it is right and how long it takes, beside diffusers and
ONNX Runtime on the same card. FOLDER gets ``gpu.json`` with every figure, the log of each step, and
traces. What fails is a result, in its own words, and what does not need it goes on. What is quick
comes first: the shipped checkpoint, then the full size; ``gpu.json`` holds what has ended so far.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from sd_bench.environment import environment
from sd_runtime.files import write_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "benchmarks/shapes/checkpoint"
ENGINES = ("tensorrt", "tensorrt-rtx", "onnxruntime:cuda")
TAIL_LINES = 12
GRACE_S = 20.0
"""For a step that is stopped, to stop what it has started."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command, and the steps that must have succeeded before it.

    ``result`` is the JSON file that it writes, where it writes one. What is to run ``on_gpu`` has
    failed where that says that no memory of a GPU was used: an engine of the processor took over.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    result: Path | None = None
    on_gpu: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step. ``exit_code`` None: not run, and ``said`` is why."""

    name: str
    command: str
    exit_code: int | None
    seconds: float = 0.0
    said: str = ""
    result: Any = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked. ``engines`` are backends, ``BACKEND:TARGET@PRECISION`` where that is named."""

    folder: Path
    checkpoint: Path | None
    engines: Sequence[str]
    precision: str
    batch_size: int
    peers: Sequence[str]
    num_inference_steps: int
    rounds: int
    captions: int

    def steps(self) -> list[Step]:
        """Everything to be run, in order."""
        found = [Step(name="tests", command=_python("-m", "pytest", "-m", "gpu", "-q"))]
        found += self._bundle("shapes", SHAPES)
        for engine in self.engines:
            found += self._rightness(engine)
        model = self.checkpoint
        needs: tuple[str, ...] = ()
        if model is None:
            model = self.folder / "checkpoint"
            script = str(ROOT / "benchmarks/make_checkpoint.py")
            command = _python(script, str(model), "--no-safety-checker")
            found.append(Step(name="checkpoint", command=command))
            needs = ("checkpoint",)
        found += self._bundle("full", model, needs=needs)
        for engine in self.engines:
            found += self._speed(engine)
        return [*found, self._peers()]

    def _bundle(self, name: str, model: Path, *, needs: tuple[str, ...] = ()) -> Iterator[Step]:
        """Export ``model`` for ONNX Runtime on the CPU, then add each engine by itself."""
        bundle = str(self.folder / f"{name}.bundle")
        options: tuple[str, ...] = ("--output", bundle, "--precision", self.precision)
        options += ("--backend", "onnxruntime", "--batch-size", str(self.batch_size))
        command = _program("sd-export", "--quiet", "--model", str(model), *options)
        yield Step(name=f"{name} export", command=command, needs=needs)
        for engine in self.engines:
            options = _chosen(engine)
            if target := engine.partition("@")[0].partition(":")[2]:
                options += ("--target", target)
            if "@" in engine and model == SHAPES:  # its own words: it was taught no others
                options += ("--calibration-prompts", str(SHAPES.with_name("captions.txt")))
            yield Step(
                name=f"{name} build {engine}",
                command=_program("sd-export", "build", "--quiet", bundle, *options),
                needs=(f"{name} export",),
            )

    def _rightness(self, engine: str) -> Iterator[Step]:
        """Its score, and how it bears clients for a while."""
        shapes = str(self.folder / "shapes.bundle")
        options = (*_chosen(engine), "--captions", str(self.captions))
        yield Step(
            name=f"quality {engine}",
            command=_program("sd-bench", "quality", shapes, *options),
            needs=(f"shapes build {engine}",),
        )
        options = (*_chosen(engine), "--clients", "8", "--seconds", "20")
        yield Step(  # hundreds of pictures: memory must be flat
            name=f"serve {engine}",
            command=_program("sd-bench", "serve", shapes, *options),
            needs=(f"shapes build {engine}",),
        )

    def _speed(self, engine: str) -> Iterator[Step]:
        """Its latency by stage, and its throughput."""
        full = str(self.folder / "full.bundle")
        output, trace = (self._result(kind, engine) for kind in ("latency", "trace"))
        options = (*_chosen(engine), "--output", str(output), "--trace", str(trace))
        options += ("--num-inference-steps", str(self.num_inference_steps))
        yield Step(
            name=f"latency {engine}",
            command=_program("sd-bench", "latency", full, *options, "--cold-starts", "1"),
            needs=(f"full build {engine}",),
            result=output,
            on_gpu=engine.startswith(("tensorrt", "onnxruntime:cuda")),
        )
        if self.batch_size > 1:
            yield self._throughput(engine)

    def _throughput(self, engine: str) -> Step:
        """Time and memory by pictures a request, up to a whole batch."""
        bundle, output = self.folder / "full.bundle", self._result("scaling", engine)
        images = [n for n in (1, 2, 4, 8, 16) if n < self.batch_size] + [self.batch_size]
        options = (*_chosen(engine), "--images", ",".join(map(str, images)))
        options += ("--steps", "1", "--requests", "1", "--runs", "3", "--memory-runs", "1")
        options += ("--num-inference-steps", str(self.num_inference_steps))
        options += ("--output", str(output))
        return Step(
            name=f"scaling {engine}",
            command=_program("sd-bench", "scaling", str(bundle), *options),
            needs=(f"full build {engine}",),
            result=output,
        )

    def _result(self, kind: str, engine: str) -> Path:
        return self.folder / f"{'-'.join((kind, *_chosen(engine)[1::2]))}.json"

    def _peers(self) -> Step:
        output = self.folder / "peers.json"
        options = tuple(word for peer in self.peers for word in ("--peer", peer))
        options += ("--num-inference-steps", str(self.num_inference_steps))
        options += ("--rounds", str(self.rounds), "--cold-starts", "1", "--output", str(output))
        bundle = str(self.folder / "full.bundle")
        command = _program("sd-bench", "peers", bundle, *options)
        return Step(name="peers", command=command, needs=("full export",), result=output)


def run(todo: Sequence[Step], folder: Path, *, minutes: float | None = None) -> list[Outcome]:
    """Run ``todo`` one after the other, each with a log in ``folder``; tells of each as it ends.

    ``gpu.json`` there is written anew each time. What has not ended after ``minutes`` is stopped,
    and what has not begun by then is not run.
    """
    outcomes: list[Outcome] = []
    here, start = environment(), perf_counter()
    for step in todo:
        left_s = None if minutes is None else 60 * minutes - (perf_counter() - start)
        failed = [o.name for o in outcomes if o.name in step.needs and o.exit_code != 0]
        if failed:
            outcome = _skipped(step, f"needs {', '.join(failed)}")
        elif left_s is not None and left_s <= 0:
            outcome = _skipped(step, f"the {minutes:g} minutes are over")
        else:
            outcome = _run(step, folder, limit_s=left_s)
        outcomes.append(outcome)
        _write_report(outcomes, here, folder / "gpu.json")
        state = {None: "not run", 0: "done"}.get(outcome.exit_code, f"exit {outcome.exit_code}")
        print(f"{outcome.name:32} {state:9} {outcome.seconds:7.1f} s", flush=True)
        print("".join(f"    {line}\n" for line in outcome.said.splitlines()), end="", flush=True)
    return outcomes


def _write_report(outcomes: Sequence[Outcome], here: dict[str, str], path: Path) -> None:
    report = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": here,
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    write_files({path: f"{json.dumps(report, indent=1)}\n".encode()})


def _run(step: Step, folder: Path, *, limit_s: float | None) -> Outcome:
    log = folder / f"{step.name.replace(' ', '-').replace(':', '-')}.log"
    start = perf_counter()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(  # noqa: S603 - our own commands
            step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        stopped = not _ends(process, limit_s)
    seconds = perf_counter() - start
    exit_code, result = process.returncode, None
    lines = log.read_text("utf-8", errors="replace").splitlines()
    if step.result is not None and not stopped and not exit_code:
        result = json.loads(step.result.read_text("utf-8"))
        if step.on_gpu and not result["gpu_memory_bytes"]:
            exit_code = 1
            lines.append("no memory of a GPU was used: these are the processor's figures")
    lines += ["stopped: the time is over"] if stopped else []
    return Outcome(
        name=step.name,
        command=" ".join(step.command),
        exit_code=exit_code,
        seconds=round(seconds, 2),
        said="\n".join(lines[-TAIL_LINES:]),
        result=result,
    )


def _ends(process: subprocess.Popen[bytes], limit_s: float | None) -> bool:
    """Whether it ends within ``limit_s``; where it does not, or an error comes, it is stopped."""
    try:
        process.wait(limit_s)
    except BaseException as error:
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        if isinstance(error, subprocess.TimeoutExpired):
            return False
        raise
    return True


def _skipped(step: Step, said: str) -> Outcome:
    return Outcome(name=step.name, command=" ".join(step.command), exit_code=None, said=said)


def _chosen(engine: str) -> tuple[str, ...]:
    """The options that name ``engine``."""
    named, _, precision = engine.partition("@")
    options = ("--backend", named.partition(":")[0])
    return (*options, "--precision", precision) if precision else options


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def _program(name: str, *arguments: str) -> tuple[str, ...]:
    """One of our commands, as installed beside this Python."""
    return (str(Path(sys.executable).parent / name), *arguments)


def main() -> int:
    """Read the command line, run everything; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="In place of a random one of full size.")
    parser.add_argument("--engine", action="append", help=f"BACKEND:TARGET@PRECISION. {ENGINES}")
    parser.add_argument("--peer", action="append", default=[], help="As of sd-bench peers.")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--batch-size", type=int, default=1, help="Above 1: throughput as well.")
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--minutes", type=float, help="Stop then; what has ended is kept.")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        folder=folder,
        checkpoint=arguments.checkpoint and arguments.checkpoint.absolute(),
        engines=arguments.engine or ENGINES,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        peers=arguments.peer,
        num_inference_steps=arguments.num_inference_steps,
        rounds=arguments.rounds,
        captions=arguments.captions,
    )
    outcomes = run(plan.steps(), folder, minutes=arguments.minutes)
    print(f"Written: {folder / 'gpu.json'}")
    return int(any(outcome.exit_code != 0 for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
