"""Requests, timed one after the other: what `sd-bench latency` counts and others build on.

Every sample is a whole request: its prompts are encoded anew, its pictures become PNG files in
memory. Nothing is written to a disk.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sd_bench.ceiling import measure_ceilings
from sd_bench.cold_start import measure_cold_start
from sd_bench.environment import environment
from sd_bench.gpu_memory import gpu_memory_bytes, held_on_gpus_bytes
from sd_bench.measurable import measurable_bundle
from sd_bench.measurement import Measurement, Sample
from sd_bench.work import request_work
from sd_engines.choice import fastest_engine
from sd_engines.errors import ConfigError
from sd_engines.memory import peak_memory_bytes, reset_peak_memory
from sd_runtime import Pipeline
from sd_runtime.command import raise_received_signal
from sd_runtime.timing import Timings, clock

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from sd_bench.measurement import Settings

WARM_UP, RUNS = 2, 10


def open_pipeline(bundle: str | os.PathLike[str], settings: Settings) -> Pipeline:
    """The pipeline that answers ``settings``, as `sd-run` opens it.

    Raises as `measurable_bundle` and `Pipeline.load`.
    """
    return Pipeline.load(
        measurable_bundle(bundle),
        backend=settings.backend,
        precision=settings.precision,
        threads=settings.threads,
        request=settings.request(),
    )


class Sampler:
    """Answers one request again and again, as often and whenever its owner asks.

    ``timings`` are the newest sample's, for traces; ``backend`` and ``precision`` are what the UNet
    runs on. Two samplers may take turns in one process.
    """

    def __init__(self, pipeline: Pipeline, settings: Settings) -> None:
        """Raises `ConfigError` for settings that no request can have."""
        self.pipeline = pipeline
        self.settings = settings
        self.timings = Timings()
        unet = pipeline.engines["unet"]
        self.backend, self.precision = unet.backend, unet.precision
        self.request = settings.request()
        self._origin_s: float | None = None

    def warm_up(self, runs: int) -> None:
        """Answer ``runs`` times without counting: engines compile and caches fill."""
        for _ in range(runs):
            self.sample()
        self._origin_s = None

    def sample(self) -> Sample:
        """Answer once. Raises as `Pipeline.generate` does."""
        raise_received_signal()
        self.pipeline.forget_prompts()
        began = clock()
        result = self.pipeline.generate(self.request)
        for index in range(len(result.pixels)):
            result.encode(index, "PNG")
        ended = clock()
        if self._origin_s is None:
            self._origin_s = began
        self.timings = result.timings
        return Sample(
            started_s=began - self._origin_s,
            # The pipeline's own total ends before the PNG.
            stages_ms={**result.timings.totals_ms(), "total": 1e3 * (ended - began)},
            unet_steps_ms=result.timings.runs_ms("unet"),
            scheduler_steps_ms=result.timings.runs_ms("scheduler"),
        )


def measure_latency(
    bundle: str | os.PathLike[str],
    settings: Settings,
    *,
    warm_up: int = WARM_UP,
    runs: int = RUNS,
    duration_s: float = 0.0,
    cold_starts: int = 0,
    ceilings: bool = False,
    on_sample: Callable[[Sampler, Sample], None] = lambda sampler, sample: None,
) -> Measurement:
    """Open ``bundle`` and answer ``settings`` at least ``runs`` times and for ``duration_s``.

    Then, with the engines closed, start `sd-run` ``cold_starts`` times, and measure the machine's
    ``ceilings`` and count the work, if asked to. ``on_sample`` is called after every sample that
    counts. Raises as `Pipeline.load` and `Pipeline.generate` do, `ConfigError` for ``runs`` < 1.
    """
    if runs < 1 or warm_up < 0 or cold_starts < 0:
        raise ConfigError(
            f"runs {runs}, warm-up {warm_up}, cold starts {cold_starts}",
            "Count at least one run; the others may be 0.",
        )
    if settings.backend == "auto":  # which may try every backend once: none of their memory counts
        sized = measurable_bundle(bundle).at(settings.height, settings.width)
        fastest_engine(sized, "unet", threads=settings.threads, precision=settings.precision)
    reset_peak_memory()
    held_before = held_on_gpus_bytes()
    with open_pipeline(bundle, settings) as pipeline:
        sampler = Sampler(pipeline, settings)
        sampler.warm_up(warm_up)
        samples: list[Sample] = []
        began = clock()
        while len(samples) < runs or clock() - began < duration_s:
            samples.append(sampler.sample())
            on_sample(sampler, samples[-1])
        engines = tuple(pipeline.engines.values())
        measurement = replace(
            measurement_of(sampler, samples),
            gpu_memory_bytes=gpu_memory_bytes(engines, before=held_before),
        )
        if ceilings:
            work = request_work(pipeline, sampler.request, sampler.timings)
            measurement = replace(measurement, work=work)
    drawn_by = replace(settings, backend=sampler.backend)
    started = [measure_cold_start(Path(bundle), drawn_by) for _ in range(cold_starts)]
    return replace(
        measurement,
        cold_start_ms=tuple(start.first_picture_ms for start in started),
        cold_start_stages_ms=tuple(start.stages_ms for start in started),
        ceilings=measure_ceilings(engines, threads=settings.threads) if ceilings else {},
    )


def measurement_of(sampler: Sampler, samples: Sequence[Sample]) -> Measurement:
    """``samples`` of ``sampler`` with what they were taken of and where, as it is now."""
    return Measurement(
        bundle=str(sampler.pipeline.bundle.path),
        fingerprint=sampler.pipeline.fingerprint,
        backend=sampler.backend,
        precision=sampler.precision,
        precisions={name: e.precision for name, e in sampler.pipeline.engines.items()},
        settings=sampler.settings,
        environment=environment(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        samples=tuple(samples),
        peak_memory_bytes=peak_memory_bytes(),
        profile={
            name: getattr(sampler.pipeline.profile, name)
            for name in ("batch_size", "height", "width")
        },
    )
