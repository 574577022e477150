"""All that only a GPU can tell, in one command: ``python benchmarks/gpu.py FOLDER`` (``make gpu``).

Makes a checkpoint of Stable Diffusion v1-4's size with random weights, builds every engine that
this machine can, and asks of each whether it is right and how long it takes, beside diffusers and
ONNX Runtime on the same card. FOLDER gets ``gpu.json`` with every figure, ``gpu.md`` with a table
of them, the log of each step, and traces. What fails is a result, in its own words, and what does
not need it goes on. It stops in time, what is quick having come first; the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from errands import Errand, run
from gpu_table import tables
from sd_runtime.files import write_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "benchmarks/shapes/checkpoint"
ENGINES = ("tensorrt", "tensorrt-rtx", "onnxruntime:cuda")


@dataclass(frozen=True)
class Asked:
    """An engine by its words: BACKEND, BACKEND:TARGET or either with @PRECISION."""

    words: str
    backend: str
    target: str
    precision: str

    @classmethod
    def of(cls, words: str) -> Self:
        """That of ``words``."""
        named, _, precision = words.partition("@")
        backend, _, target = named.partition(":")
        return cls(words, backend, target, precision)

    @property
    def options(self) -> tuple[str, ...]:
        """How commands that draw are asked for it."""
        precision = ("--precision", self.precision) if self.precision else ()
        return ("--backend", self.backend, *precision)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is to run it."""
        return self.backend.startswith("tensorrt") or self.target == "cuda"

    def file(self, folder: Path, kind: str) -> Path:
        """Where its figures of this ``kind`` go."""
        name = "-".join(filter(None, (kind, self.backend, self.precision)))
        return folder / f"{name}.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked of whom."""

    folder: Path
    checkpoint: Path | None
    engines: Sequence[Asked]
    precision: str
    batch_size: int
    peers: Sequence[str]
    num_inference_steps: int
    rounds: int
    captions: int

    def errands(self) -> list[Errand]:
        """Everything to be run, in order."""
        found = [Errand(name="tests", command=_python("-m", "pytest", "-m", "gpu", "-q"))]
        found += self._bundle("shapes", SHAPES)
        found += self._shapes("quality", "--captions", str(self.captions))
        model = self.checkpoint
        needs: tuple[str, ...] = ()
        if model is None:
            model = self.folder / "checkpoint"
            script = str(ROOT / "benchmarks/make_checkpoint.py")
            command = _python(script, str(model), "--no-safety-checker")
            found.append(Errand(name="checkpoint", command=command))
            needs = ("checkpoint",)
        found += self._bundle("full", model, needs=needs)
        found += map(self._latency, self.engines)
        found.append(self._peers())
        # hundreds of pictures: memory must be flat
        found += self._shapes("serve", "--clients", "8", "--seconds", "20")
        if self.batch_size > 1:
            found += map(self._throughput, self.engines)
        return found

    def _bundle(self, name: str, model: Path, *, needs: tuple[str, ...] = ()) -> Iterator[Errand]:
        """Export ``model`` for ONNX Runtime on the CPU, then add each engine by itself."""
        bundle = str(self.folder / f"{name}.bundle")
        options: tuple[str, ...] = ("--output", bundle, "--precision", self.precision)
        options += ("--backend", "onnxruntime", "--batch-size", str(self.batch_size))
        command = _program("sd-export", "--quiet", "--model", str(model), *options)
        yield Errand(name=f"{name} export", command=command, needs=needs)
        for engine in self.engines:
            options = engine.options
            if engine.target:
                options += ("--target", engine.target)
            if engine.precision and model == SHAPES:  # its own words: it was taught no others
                options += ("--calibration-prompts", str(SHAPES.with_name("captions.txt")))
            yield Errand(
                name=f"{name} build {engine.words}",
                command=_program("sd-export", "build", "--quiet", bundle, *options),
                needs=(f"{name} export",),
            )

    def _shapes(self, command: str, *options: str) -> Iterator[Errand]:
        """``sd-bench command`` of the shipped checkpoint, by each engine."""
        bundle = str(self.folder / "shapes.bundle")
        for engine in self.engines:
            words = (command, bundle, *engine.options, *options, "--json")
            yield Errand(
                name=f"{command} {engine.words}",
                command=_program("sd-bench", *words),
                needs=(f"shapes build {engine.words}",),
                prints_json=True,
            )

    def _latency(self, engine: Asked) -> Errand:
        """Its latency by stage."""
        output, trace = (engine.file(self.folder, kind) for kind in ("latency", "trace"))
        options = (*engine.options, "--output", str(output), "--trace", str(trace))
        options += ("--num-inference-steps", str(self.num_inference_steps), "--cold-starts", "1")
        return Errand(
            name=f"latency {engine.words}",
            command=_program("sd-bench", "latency", str(self.folder / "full.bundle"), *options),
            needs=(f"full build {engine.words}",),
            result=output,
            on_gpu=engine.on_gpu,
        )

    def _throughput(self, engine: Asked) -> Errand:
        """Time and memory by pictures a request, up to a whole batch."""
        bundle, output = self.folder / "full.bundle", engine.file(self.folder, "scaling")
        images = [n for n in (1, 2, 4, 8, 16) if n < self.batch_size] + [self.batch_size]
        options = (*engine.options, "--images", ",".join(map(str, images)))
        options += ("--steps", "1", "--requests", "1", "--runs", "3", "--memory-runs", "1")
        options += ("--num-inference-steps", str(self.num_inference_steps))
        options += ("--output", str(output))
        return Errand(
            name=f"scaling {engine.words}",
            command=_program("sd-bench", "scaling", str(bundle), *options),
            needs=(f"full build {engine.words}",),
            result=output,
        )

    def _peers(self) -> Errand:
        output = self.folder / "peers.json"
        options = tuple(word for peer in self.peers for word in ("--peer", peer))
        options += ("--num-inference-steps", str(self.num_inference_steps))
        options += ("--rounds", str(self.rounds), "--cold-starts", "1", "--output", str(output))
        bundle = str(self.folder / "full.bundle")
        command = _program("sd-bench", "peers", bundle, *options)
        return Errand(name="peers", command=command, needs=("full export",), result=output)


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def _program(name: str, *arguments: str) -> tuple[str, ...]:
    """One of our commands, as installed beside this Python."""
    return (str(Path(sys.executable).parent / name), *arguments)


def main() -> int:
    """Read the command line, run everything; 1 where anything failed or is left to do."""
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
    parser.add_argument("--minutes", type=float, default=8.0, help="Stop then. [default: 8]")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        folder=folder,
        checkpoint=arguments.checkpoint and arguments.checkpoint.absolute(),
        engines=[Asked.of(words) for words in arguments.engine or ENGINES],
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        peers=arguments.peer,
        num_inference_steps=arguments.num_inference_steps,
        rounds=arguments.rounds,
        captions=arguments.captions,
    )
    report = folder / "gpu.json"
    outcomes = run(plan.errands(), report, cwd=ROOT, minutes=arguments.minutes)
    table = tables(outcomes)
    write_files({folder / "gpu.md": table.encode()})
    print(f"\n{table}\nWritten: {report}, {folder / 'gpu.md'}")
    return int(any(outcome.exit_code != 0 for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
