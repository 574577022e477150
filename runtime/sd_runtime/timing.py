"""When each stage of a request ran and how long it took: two clock reads a stage, kept by name."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from sd_engines.border import import_package

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sd_engines.entries import EngineEntry

clock = perf_counter

Span: TypeAlias = tuple[float, float]
"""When one run of a stage began and ended, in seconds of `clock`, which all processes share."""


class Clock(Protocol):
    """Notes moments, and tells later when they were."""

    def now(self) -> Any:
        """The moment that what was asked for so far is done."""

    def wait(self, moment: Any) -> None:
        """Return when ``moment`` is over."""

    def seconds(self, moment: Any) -> float:
        """When ``moment`` was, in seconds of `clock`."""


class HostClock:
    """For engines whose runs end when they return: a moment is its seconds."""

    now = staticmethod(clock)

    def wait(self, moment: float) -> None:
        """At once: it is."""

    def seconds(self, moment: float) -> float:
        """As it is."""
        return moment


class DeviceClock:
    """For engines whose runs are enqueued: a moment is when the GPU comes to that point.

    By events of ``cuda``, `cupy.cuda`, on the current stream. The host waits for the GPU when this
    is made, when it is told to, and when it asks for the seconds.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._start = self.now()
        self._start.synchronize()
        self._start_s = clock()

    def now(self) -> Any:
        """An event."""
        event = self._cuda.Event()
        event.record()
        return event

    def wait(self, moment: Any) -> None:
        """Until the GPU has come to it."""
        moment.synchronize()

    def seconds(self, moment: Any) -> float:
        """When the GPU came to it."""
        moment.synchronize()
        return self._start_s + 1e-3 * float(self._cuda.get_elapsed_time(self._start, moment))


def clock_of(engine: EngineEntry) -> Clock:
    """That which sees what ``engine`` does."""
    if engine.target == "cpu":
        return HostClock()
    return DeviceClock(import_package("cupy", extra="cuda").cuda)


class Timings:
    """Wall-clock spans of stages, in the order the stages first ran.

    A stage may run many times ("unet" once a step, "vae_decoder" once a batch). Spans are in
    seconds once `settle` was called; with the host's clock they always are.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or HostClock()
        self.now = self._clock.now
        self.wait = self._clock.wait
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    def add(self, stage: str, began: Any, ended: Any) -> None:
        """Note one run of ``stage``, between two moments of `now`."""
        self._spans.setdefault(stage, []).append((began, ended))

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Time the body of a ``with`` as one run of ``stage``."""
        began = self.now()
        try:
            yield
        finally:
            self.add(stage, began, self.now())

    def settle(self) -> None:
        """Turn every moment into seconds; what is timed from here on is the host's."""
        seconds = self._clock.seconds
        self._spans = {
            stage: [(seconds(began), seconds(ended)) for began, ended in spans]
            for stage, spans in self._spans.items()
        }
        self._clock = HostClock()
        self.now, self.wait = self._clock.now, self._clock.wait

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
