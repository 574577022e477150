"""Commands run one after the other, each with what it came to: failures are results like others.

What has ended is written down at once, and what has succeeded is kept: run again on the same
machine and commit, they go on where they stopped.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from sd_bench.environment import difference, environment
from sd_runtime.files import write_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_TAIL_LINES: Final = 12
_GRACE_S: Final = 20.0
"""For a command that is stopped, to stop what it has started."""


@dataclass(frozen=True, kw_only=True)
class Errand:
    """One command, and the errands that must have succeeded before it.

    ``result`` is the JSON file that it writes, where it writes one; with ``prints_json`` it is the
    last line that it prints. What is to run ``on_gpu`` has failed where its result says that no
    memory of a GPU was used: an engine of the processor took over.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    result: Path | None = None
    prints_json: bool = False
    on_gpu: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an errand. ``exit_code`` None: not run, and ``said`` is why.

    ``kept`` is what was not run this time, since it had succeeded before.
    """

    name: str
    command: str
    exit_code: int | None
    seconds: float = 0.0
    said: str = ""
    result: Any = None
    kept: bool = False

    @property
    def state(self) -> str:
        """How it ended, in a word or two."""
        if self.exit_code:
            return f"exit {self.exit_code}"
        return "not run" if self.exit_code is None else "kept" if self.kept else "done"


def run(
    errands: Sequence[Errand], report: Path, *, cwd: Path, minutes: float | None = None
) -> list[Outcome]:
    """Run ``errands`` in ``cwd``, each with a log beside ``report``; tells of each as it ends.

    ``report`` is written anew each time. What it says has succeeded here is kept, unless something
    that it needs is run again. What has not ended after ``minutes`` is stopped, and what has not
    begun by then is not run.
    """
    here, start = environment(), perf_counter()
    before = _succeeded(report, here)
    found: dict[str, Outcome] = {}
    for errand in errands:
        left_s = None if minutes is None else 60 * minutes - (perf_counter() - start)
        failed = [name for name in errand.needs if found[name].exit_code != 0]
        known = before.pop(errand.name, None)
        if failed:
            outcome = _skipped(errand, f"needs {', '.join(failed)}")
        elif known and known.command == _words(errand) and all(found[n].kept for n in errand.needs):
            outcome = replace(known, kept=True)
        elif left_s is not None and left_s <= 0:
            outcome = _skipped(errand, f"the {minutes:g} minutes are over")
        else:
            outcome = _run(errand, report.parent, cwd=cwd, limit_s=left_s)
        found[errand.name] = outcome
        _write(report, [*found.values(), *before.values()], here)
        print(f"{outcome.name:32} {outcome.state:9} {outcome.seconds:7.1f} s", flush=True)
        if not outcome.kept:
            said = "".join(f"    {line}\n" for line in outcome.said.splitlines())
            print(said, end="", flush=True)
    return list(found.values())


def _succeeded(report: Path, here: Mapping[str, str]) -> dict[str, Outcome]:
    """What ``report`` says has succeeded, by name, on this machine and with the same program."""
    try:
        written = json.loads(report.read_text("utf-8"))
        there = written["environment"]
        outcomes = [Outcome(**fields) for fields in written["errands"]]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    commit = here.get("commit", "")
    if difference(there, here) or there.get("commit", "") != commit or commit.endswith("+"):
        return {}
    return {outcome.name: outcome for outcome in outcomes if outcome.exit_code == 0}


def _write(report: Path, outcomes: Iterable[Outcome], here: Mapping[str, str]) -> None:
    document = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": here,
        "errands": [asdict(outcome) for outcome in outcomes],
    }
    write_files({report: f"{json.dumps(document, indent=1)}\n".encode()})


def _run(errand: Errand, folder: Path, *, cwd: Path, limit_s: float | None) -> Outcome:
    log = folder / f"{errand.name.replace(' ', '-').replace(':', '-')}.log"
    start = perf_counter()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(  # noqa: S603 - our own commands
            errand.command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        in_time = _ends(process, limit_s)
    seconds = perf_counter() - start
    exit_code, result = process.returncode, None
    lines = log.read_text("utf-8", errors="replace").splitlines()
    if in_time and not exit_code:
        try:
            result = _result(errand, lines)
        except (OSError, ValueError, IndexError) as error:
            exit_code = 1
            lines.append(f"it wrote no result: {error}")
        if errand.on_gpu and result and not result["gpu_memory_bytes"]:
            exit_code = 1
            lines.append("no memory of a GPU was used: these are the processor's figures")
    lines += [] if in_time else ["stopped: the time is over"]
    return Outcome(
        name=errand.name,
        command=_words(errand),
        exit_code=exit_code,
        seconds=round(seconds, 2),
        said="\n".join(lines[-_TAIL_LINES:]),
        result=result,
    )


def _result(errand: Errand, lines: Sequence[str]) -> Any:
    if errand.prints_json:
        return json.loads(lines[-1])
    return None if errand.result is None else json.loads(errand.result.read_text("utf-8"))


def _ends(process: subprocess.Popen[bytes], limit_s: float | None) -> bool:
    """Whether it ends within ``limit_s``; where it does not, or an error comes, it is stopped."""
    try:
        process.wait(limit_s)
    except BaseException as error:
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        if isinstance(error, subprocess.TimeoutExpired):
            return False
        raise
    return True


def _skipped(errand: Errand, said: str) -> Outcome:
    return Outcome(name=errand.name, command=_words(errand), exit_code=None, said=said)


def _words(errand: Errand) -> str:
    return " ".join(errand.command)
