"""How long each stage of a request took: two clock reads a stage, kept by name."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

clock = perf_counter


class Timings:
    """Wall-clock durations of stages, in the order the stages first ran.

    A stage may run many times ("unet" once a step, "vae_decoder" once a batch). On a GPU the
    stages before the decoder are queued, not waited for, and their time shows in the decoder's.
    """

    def __init__(self) -> None:
        self._durations_s: dict[str, list[float]] = {}

    def add(self, stage: str, duration_s: float) -> None:
        """Note one run of ``stage``."""
        self._durations_s.setdefault(stage, []).append(duration_s)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Time the body of a ``with`` as one run of ``stage``."""
        start = clock()
        try:
            yield
        finally:
            self.add(stage, clock() - start)

    def runs_ms(self, stage: str) -> list[float]:
        """Every run of ``stage`` in ms; empty when it never ran."""
        return [1e3 * duration for duration in self._durations_s.get(stage, [])]

    def totals_ms(self) -> dict[str, float]:
        """Stage → ms over all its runs."""
        return {stage: 1e3 * sum(runs) for stage, runs in self._durations_s.items()}

    def merge(self, other: Timings) -> None:
        """Append every run that ``other`` noted."""
        for stage, durations in other._durations_s.items():
            self._durations_s.setdefault(stage, []).extend(durations)

    def to_json(self) -> dict[str, float | list[float]]:
        """Totals in ms by stage, and ``unet_steps``: the UNet's every call."""
        rounded = {stage: round(total, 3) for stage, total in self.totals_ms().items()}
        return {**rounded, "unet_steps": [round(run, 3) for run in self.runs_ms("unet")]}
