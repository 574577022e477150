"""A sampler in a process of its own, whose interpreter may hold another version of everything.

So a gate compares two versions of the toolkit or of a backend on one machine in one run, and
neither side's threads, memory or imports are the other's. The process that is not asked stands
still. Run as a module, this file is the other end: JSON lines in, JSON lines out.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final, TextIO

from sd_bench.killable import Killable
from sd_bench.measurement import Measurement, Sample, Settings
from sd_bench.peers.worker import Worker, WorkerError
from sd_engines.errors import BackendError, SdError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_OF_THIS_PYTHON: Final = ("PYTHONPATH", "PYTHONHOME")
"""Variables by which another interpreter would import what this one does."""


class SamplerProcess(Killable):
    """A bundle opened, warmed up, and paused until it is asked for a sample."""

    def __init__(
        self, bundle: Path, settings: Settings, *, python: str | Path, warm_up: int, log: Path
    ) -> None:
        """Start ``python``, an interpreter that has sd-toolkit; ``log`` takes what it prints.

        Raises `BackendError` where it does not start, or with the words of the error that it met.
        """
        self._bundle, self._python = bundle, python
        command = [python, "-P", "-m", "sd_bench.sampler_process"]
        kept = {
            name: value
            for name, value in os.environ.items()
            if str(python) == sys.executable or name not in _OF_THIS_PYTHON
        }
        try:
            self._worker = Worker(command, log=log, environment=kept)
        except OSError as error:
            raise self._failed(str(error)) from error
        try:
            # What is None it need not know: another version may have fewer settings.
            given = {name: value for name, value in asdict(settings).items() if value is not None}
            self._ask({"bundle": str(bundle), "settings": given, "warm_up": warm_up})
        except BaseException:
            self.kill()
            raise

    def sample(self) -> Sample:
        """One request answered. Raises `BackendError` where it fails or the process has ended."""
        return Sample(**self._ask({"ask": "sample"})["sample"])

    def measurement_of(self, samples: Sequence[Sample]) -> Measurement:
        """``samples`` with what they were taken of and where, as the process sees it."""
        bare = Measurement.from_json(self._ask({"ask": "measurement"})["measurement"])
        return replace(bare, samples=tuple(samples))

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        self._worker.resume()
        try:
            answer = self._worker.ask(question)
        except WorkerError as error:
            raise self._failed(error.message) from error
        self._worker.pause()
        return answer

    def _failed(self, why: str) -> BackendError:
        return BackendError(
            f"{self._bundle} in a process of {self._python}: {why}",
            "Try it alone there: PYTHON -m pip install sd-toolkit, then sd-bench latency BUNDLE.",
        )

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def kill(self) -> None:
        """End it now."""
        self._worker.kill()


def serve(questions: TextIO, answers: TextIO) -> None:
    """The other end: the first line opens, each later one asks; ends where they end."""
    from sd_bench.latency import Sampler, measurement_of, open_pipeline

    def answer(*, ok: bool = True, **found: Any) -> None:
        answers.write(json.dumps({"ok": ok, **found}) + "\n")
        answers.flush()

    try:
        order = json.loads(questions.readline())
        settings = Settings(**order["settings"])
        with open_pipeline(order["bundle"], settings) as pipeline:
            sampler = Sampler(pipeline, settings)
            sampler.warm_up(order["warm_up"])
            answer()
            for line in iter(questions.readline, ""):
                if json.loads(line)["ask"] == "sample":
                    answer(sample=asdict(sampler.sample()))
                else:
                    answer(measurement=measurement_of(sampler, []).to_json())
    except SdError as error:
        answer(ok=False, error=f"{error.message} ({error.hint})")


if __name__ == "__main__":
    # What libraries print must not come between the answers.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        serve(sys.stdin, stdout)
