"""How time and memory grow along one axis at a time: steps, pictures, requests at once, size.

Each axis holds loads that differ in one number; the line through their medians says what a
request costs at least and what one unit more adds. The samples of all loads are taken in turns,
forwards and backwards, so that a machine that slows down meanwhile tilts no line.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from statistics import median
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sd_bench.environment import environment
from sd_bench.line import fit_line
from sd_bench.load import Load, measure_peak_memory, sample_at_once
from sd_bench.measurable import measurable_bundle
from sd_engines.choice import fastest_engine
from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from sd_bench.latency import Sampler
    from sd_bench.line import Line
    from sd_bench.measurement import Sample, Settings
    from sd_engines.bundle import Bundle
    from sd_runtime import Pipeline

T = TypeVar("T")
FORMAT: Final = "sd-bench scaling"
FORMAT_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Loads by what they differ in: ``name``, counted in ``unit``."""

    name: str
    unit: str
    loads: Mapping[float, Load]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one load took: every sample of every request, and the peak memory of processes.

    Samples of requests that began at once lie next to each other.
    """

    samples: tuple[Sample, ...]
    peaks_memory_bytes: tuple[int, ...]

    @property
    def totals_ms(self) -> list[float]:
        """Each request from its prompt to its PNG files in memory."""
        return [sample.stages_ms["total"] for sample in self.samples]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Axes and what was observed at their loads. ``backend`` and ``precision`` ran the UNet."""

    axes: tuple[Axis, ...]
    observations: Mapping[Load, Observation]
    backend: str
    precision: str
    environment: Mapping[str, str]
    measured_at: str

    def totals_ms(self, axis: Axis) -> list[float]:
        """The median of each load of ``axis``."""
        return [median(self.observations[load].totals_ms) for load in axis.loads.values()]

    def peaks_bytes(self, axis: Axis) -> list[float]:
        """The median peak memory of each load of ``axis``."""
        return [median(self.observations[load].peaks_memory_bytes) for load in axis.loads.values()]

    def pictures_per_s(self, axis: Axis) -> list[float]:
        """At each load of ``axis``: its pictures over the time until the last of them is done.

        That is the median of its turns; requests at once begin together.
        """
        return [
            1e3 * load.requests * load.settings.num_images / median(self._turns_ms(load))
            for load in axis.loads.values()
        ]

    def _turns_ms(self, load: Load) -> list[float]:
        totals_ms, at_once = self.observations[load].totals_ms, load.requests
        return [max(totals_ms[i : i + at_once]) for i in range(0, len(totals_ms), at_once)]

    def time_line(self, axis: Axis) -> Line:
        """Milliseconds over ``axis``."""
        return fit_line(list(axis.loads), self.totals_ms(axis))

    def memory_line(self, axis: Axis) -> Line:
        """Bytes over ``axis``."""
        return fit_line(list(axis.loads), self.peaks_bytes(axis))

    def summary(self) -> dict[str, Any]:
        """What a reader wants of it, as JSON: points and lines, no samples."""
        return {
            "backend": self.backend,
            "precision": self.precision,
            "measured_at": self.measured_at,
            "axes": [
                {
                    "name": axis.name,
                    "unit": axis.unit,
                    "at": list(axis.loads),
                    "total_ms": self.totals_ms(axis),
                    "pictures_per_s": self.pictures_per_s(axis),
                    "peak_memory_bytes": self.peaks_bytes(axis),
                    "time_line_ms": asdict(self.time_line(axis)),
                    "memory_line_bytes": asdict(self.memory_line(axis)),
                }
                for axis in self.axes
            ],
        }

    def to_json(self) -> str:
        """The file's text: the summary, the environment, and every load with its samples."""
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **self.summary(),
            "environment": dict(self.environment),
            "loads": [{**asdict(load), **asdict(o)} for load, o in self.observations.items()],
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"


def scaling_axes(
    bundles: Sequence[str | os.PathLike[str]],
    settings: Settings,
    *,
    steps: Sequence[int],
    images: Sequence[int],
    requests: Sequence[int],
) -> tuple[Axis, ...]:
    """The axes of the first bundle, and that of size over all of them; none of one point.

    A backend "auto" becomes the one that is fastest for the first bundle, for all of them.
    `ConfigError` for settings that no request can have, bundles of different checkpoints, or where
    no axis is left.
    """
    settings.request()
    opened = [measurable_bundle(path) for path in bundles]
    checkpoints = {(b.manifest.model.source, b.manifest.model.revision) for b in opened}
    if len(checkpoints) > 1:
        names = ", ".join(sorted(source for source, _ in checkpoints))
        raise ConfigError(
            f"the bundles are of different checkpoints: {names}",
            "Export one checkpoint in several sizes: sd-export --model MODEL --size WIDTHxHEIGHT …",
        )
    if settings.backend == "auto":
        sized = opened[0].at(settings.height, settings.width)
        engine = fastest_engine(
            sized, "unet", threads=settings.threads, precision=settings.precision
        )
        settings = settings if engine is None else replace(settings, backend=engine.backend)
    base = Load(bundle=str(opened[0].path), settings=settings)

    def with_(**changes: Any) -> Load:
        return replace(base, settings=replace(settings, **changes))

    axes = (
        Axis(
            name="steps",
            unit="step",
            loads={n: with_(num_inference_steps=n) for n in sorted(set(steps))},
        ),
        Axis(
            name="pictures per request",
            unit="picture",
            loads={n: with_(num_images=n) for n in sorted(set(images))},
        ),
        Axis(
            name="requests at once",
            unit="request",
            loads={n: replace(base, requests=n) for n in sorted(set(requests))},
        ),
        Axis(
            name="1000 pixels per picture",
            unit="1000 pixels",
            loads=_loads_by_size(opened, settings),
        ),
    )
    kept = tuple(axis for axis in axes if len(axis.loads) > 1)
    if not kept:
        raise ConfigError(
            "nothing varies",
            "Name two or more --steps, --images or --requests, or bundles of more sizes.",
        )
    return kept


def _loads_by_size(bundles: Sequence[Bundle], settings: Settings) -> dict[float, Load]:
    """A load for each size of ``bundles``, by thousands of pixels; of as many, the first."""
    sizes: dict[float, Load] = {}
    for bundle in bundles:
        own = bundle.manifest.at(settings.height, settings.width).profile
        for profile in (own, *(size.profile for size in bundle.manifest.all_sizes)):
            asked = settings
            if profile != own:
                asked = replace(settings, height=profile.height, width=profile.width)
            load = Load(bundle=str(bundle.path), settings=asked)
            sizes.setdefault(profile.height * profile.width / 1000, load)
    return dict(sorted(sizes.items()))


def measure_scaling(
    axes: Sequence[Axis],
    *,
    runs: int,
    memory_runs: int,
    on_turn: Callable[[str], None] = lambda words: None,
) -> Scaling:
    """Answer every load of ``axes`` ``runs`` times in turns, all in this process.

    Then ``memory_runs`` times each load once in a process of its own, in turns too. ``on_turn`` is
    told what comes next. Raises as `Pipeline.load` and `Pipeline.generate` do.
    """
    loads = list(dict.fromkeys(load for axis in axes for load in axis.loads.values()))
    samples: dict[Load, list[Sample]] = {load: [] for load in loads}
    with ExitStack() as stack:
        samplers = _open(loads, stack)
        on_turn("Warming up")
        for sampler in chain.from_iterable(samplers.values()):
            sampler.warm_up(1)
        for number, turn in enumerate(turns(loads, runs), start=1):
            on_turn(f"Time, round {number} of {runs}")
            for load in turn:
                samples[load] += sample_at_once(samplers[load])
        first = samplers[loads[0]][0]
    peaks: dict[Load, list[int]] = {load: [] for load in loads}
    for number, turn in enumerate(turns(loads, memory_runs), start=1):
        on_turn(f"Memory, round {number} of {memory_runs}")
        for load in turn:
            peaks[load].append(measure_peak_memory(load))
    return Scaling(
        axes=tuple(axes),
        observations={
            load: Observation(samples=tuple(samples[load]), peaks_memory_bytes=tuple(peaks[load]))
            for load in loads
        },
        backend=first.backend,
        precision=first.precision,
        environment=environment(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def turns(loads: Sequence[T], runs: int) -> list[list[T]]:
    """``loads`` in order and back, ``runs`` times in all: steady drift adds to all points alike."""
    return [list(loads) if run % 2 == 0 else list(reversed(loads)) for run in range(runs)]


def _open(loads: Sequence[Load], stack: ExitStack) -> dict[Load, list[Sampler]]:
    """Each load's samplers, on as few pipelines as the largest load of a bundle and size needs."""
    pipelines: dict[tuple[str, int | None, int | None], list[Pipeline]] = {}
    samplers = {}
    for load in loads:
        key = load.bundle, load.settings.height, load.settings.width
        opened = pipelines.setdefault(key, [])
        load.open_pipelines(stack, opened)
        samplers[load] = load.samplers(opened)
    return samplers
