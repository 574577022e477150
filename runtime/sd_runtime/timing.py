"""When each stage of a request ran and how long it took: two clock reads a stage, kept by name."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

clock = perf_counter

Span: TypeAlias = tuple[float, float]
"""When one run of a stage began and ended, in seconds of `clock`, which all processes share."""


class Timings:
    """Wall-clock spans of stages, in the order the stages first ran.

    A stage may run many times ("unet" once a step, "vae_decoder" once a batch). On a GPU the
    stages before the decoder are queued, not waited for, and their time shows in the decoder's.
    """

    def __init__(self) -> None:
        self._spans: dict[str, list[Span]] = {}

    def add(self, stage: str, began_s: float, ended_s: float) -> None:
        """Note one run of ``stage``."""
        self._spans.setdefault(stage, []).append((began_s, ended_s))

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Time the body of a ``with`` as one run of ``stage``."""
        began = clock()
        try:
            yield
        finally:
            self.add(stage, began, clock())

    @property
    def spans(self) -> Mapping[str, Sequence[Span]]:
        """Every run by stage."""
        return self._spans

    def runs_ms(self, stage: str) -> list[float]:
        """Every run of ``stage`` in ms; empty when it never ran."""
        return [1e3 * (ended - began) for began, ended in self._spans.get(stage, [])]

    def totals_ms(self) -> dict[str, float]:
        """Stage → ms over all its runs."""
        return {stage: sum(self.runs_ms(stage)) for stage in self._spans}

    def merge(self, other: Timings) -> None:
        """Append every run that ``other`` noted."""
        for stage, spans in other._spans.items():
            self._spans.setdefault(stage, []).extend(spans)

    def to_json(self) -> dict[str, float | list[float]]:
        """Totals in ms by stage, and ``unet_steps``: the UNet's every call."""
        rounded = {stage: round(total, 3) for stage, total in self.totals_ms().items()}
        return {**rounded, "unet_steps": [round(run, 3) for run in self.runs_ms("unet")]}
