"""A measurement in figures: percentiles by stage, shares of the ceilings, and a table of them.

The words are trtexec's where it has one: latency, throughput, min, max, mean, median,
percentile(99%).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from sd_bench.measurement import STEPS
from sd_bench.text_table import aligned
from sd_engines.spec import TEXT_ENCODERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_bench.measurement import Measurement

_COLUMNS: Final = ("min", "max", "mean", "median", "percentile(90%)", "percentile(99%)")
_FIRST_STAGES: Final = ("tokenize", *TEXT_ENCODERS, "noise", "model_input")
_LAST_STAGES: Final = ("unet_shallow", "vae_decoder", "safety_checker", "png")


@dataclass(frozen=True)
class Latency:
    """What many durations of one thing come to, in ms; percentiles interpolate as numpy does."""

    runs: int
    min: float
    max: float
    mean: float
    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, durations_ms: Sequence[float]) -> Self:
        """Of one duration or more."""
        low, middle, p90, p99, high = np.percentile(durations_ms, [0, 50, 90, 99, 100]).tolist()
        mean = float(np.mean(durations_ms))
        return cls(len(durations_ms), low, high, mean, middle, p90, p99)


@dataclass(frozen=True)
class Achieved:
    """What one component reached at its median, beside what the machine does at its best.

    Shares are None where no ceiling of the component's kind was measured.
    """

    call_ms: float
    flops_per_s: float
    bytes_per_s: float
    share_of_matmul: float | None
    share_of_copy: float | None


def latencies(measurement: Measurement) -> dict[str, Latency]:
    """By stage, in the order they run; steps below their sums, "rest" is what no stage holds."""
    stages = [*_FIRST_STAGES, *(name for pair in STEPS.items() for name in pair), *_LAST_STAGES]
    known = {name for sample in measurement.samples for name in sample.stages_ms}
    stages += sorted(known - {*stages, "total"})
    durations = {stage: measurement.stage_ms(stage) for stage in stages}
    durations["rest"] = [
        sample.stages_ms["total"]
        - sum(ms for stage, ms in sample.stages_ms.items() if stage != "total")
        for sample in measurement.samples
    ]
    durations["total"] = measurement.stage_ms("total")
    return {stage: Latency.of(found) for stage, found in durations.items() if found}


def achieved(measurement: Measurement) -> dict[str, Achieved]:
    """By component of `Measurement.work`."""
    found = {}
    copy = measurement.ceilings.get("copy_bytes_per_s")
    for name, work in measurement.work.items():
        matmul = measurement.ceilings.get(f"matmul_{_precision(measurement, name)}_flops")
        call_s = float(np.median(measurement.stage_ms(name))) / work["calls"] / 1e3
        flops_per_s, bytes_per_s = work["flops"] / call_s, work["bytes"] / call_s
        found[name] = Achieved(
            call_ms=1e3 * call_s,
            flops_per_s=flops_per_s,
            bytes_per_s=bytes_per_s,
            share_of_matmul=flops_per_s / matmul if matmul else None,
            share_of_copy=bytes_per_s / copy if copy else None,
        )
    return found


def throughput(measurement: Measurement) -> float:
    """Pictures a second, one request after the other."""
    seconds = sum(measurement.stage_ms("total")) / 1e3
    return measurement.settings.num_images * len(measurement.samples) / seconds


def report(measurement: Measurement) -> dict[str, Any]:
    """All figures as one JSON object, without the samples they come from."""
    cold = measurement.cold_start_ms
    return {
        "bundle": measurement.bundle,
        "backend": measurement.backend,
        "precision": measurement.precision,
        "throughput_pictures_per_s": throughput(measurement),
        "latency_ms": {stage: asdict(found) for stage, found in latencies(measurement).items()},
        "unet_steps_median_ms": [
            float(np.median(step))
            for step in zip(*(s.unet_steps_ms for s in measurement.samples), strict=True)
        ],
        "cold_start_ms": asdict(Latency.of(cold)) if cold else None,
        "achieved": {name: asdict(found) for name, found in achieved(measurement).items()},
        "ceilings": dict(measurement.ceilings),
        "peak_memory_bytes": measurement.peak_memory_bytes,
        "gpu_memory_bytes": measurement.gpu_memory_bytes,
    }


def table(measurement: Measurement) -> str:
    """The same for people: aligned, in the order of a request."""
    found = latencies(measurement)
    lines = [
        f"{measurement.bundle}: {measurement.backend} {measurement.precision}",
        f"{measurement.settings.words}; {found['total'].runs} runs",
        "",
        *_latency_lines(found),
        "",
        f"Throughput   {throughput(measurement):.4g} pictures/s",
    ]
    if measurement.cold_start_ms:
        lines.append(f"Cold start   {_cold_start_words(measurement)}")
    lines.append(f"Peak memory  {measurement.peak_memory_bytes / 2**20:.0f} MiB")
    if measurement.gpu_memory_bytes:
        lines.append(f"GPU memory   {measurement.gpu_memory_bytes / 2**20:.0f} MiB")
    if measurement.work:
        lines += ["", *_work_lines(measurement)]
    return "\n".join(lines)


def _latency_lines(found: dict[str, Latency]) -> list[str]:
    rows: list[tuple[str, ...]] = [("Latency, ms", *_COLUMNS, "share")]
    parts = set(STEPS.values())
    for stage, latency in found.items():
        values = (latency.min, latency.max, latency.mean, latency.median, latency.p90, latency.p99)
        share = "" if stage in parts else f"{latency.mean / found['total'].mean:.1%}"
        name = f"  each, of {latency.runs}" if stage in parts else stage
        rows.append((name, *(f"{value:.3f}" for value in values), share))
    return aligned(rows)


def _work_lines(measurement: Measurement) -> list[str]:
    header = ("Work", "", "calls", "GFLOP", "MB", "TFLOP/s", "of matmul", "GB/s", "of copy")
    rows: list[tuple[str, ...]] = [header]
    for name, reached in achieved(measurement).items():
        work = measurement.work[name]
        rows.append(
            (
                name,
                _precision(measurement, name),
                f"{work['calls']:.0f}",
                f"{work['flops'] / 1e9:.4g}",
                f"{work['bytes'] / 1e6:.4g}",
                f"{reached.flops_per_s / 1e12:.3f}",
                _percent(reached.share_of_matmul),
                f"{reached.bytes_per_s / 1e9:.2f}",
                _percent(reached.share_of_copy),
            )
        )
    copy = measurement.ceilings.get("copy_bytes_per_s", 0.0)
    for ceiling, best in measurement.ceilings.items():
        if ceiling.startswith("matmul_"):
            precision = ceiling.removeprefix("matmul_").removesuffix("_flops")
            flops = f"{best / 1e12:.3f}"
            bandwidth = f"{copy / 1e9:.2f}" if copy else "–"
            rows.append(("ceiling", precision, "", "", "", flops, "", bandwidth, ""))
    return aligned(rows)


def _cold_start_words(measurement: Measurement) -> str:
    cold = Latency.of(measurement.cold_start_ms)
    stages = {name for start in measurement.cold_start_stages_ms for name in start}
    medians = {
        name: float(np.median([start[name] for start in measurement.cold_start_stages_ms]))
        for name in ("process", "load", "generate", "png", "other")
        if name in stages
    }
    parts = ", ".join(f"{name} {median:.0f}" for name, median in medians.items())
    return (
        f"min = {cold.min:.0f} ms, max = {cold.max:.0f} ms, mean = {cold.mean:.0f} ms, "
        f"median = {cold.median:.0f} ms ({parts})"
    )


def _precision(measurement: Measurement, component: str) -> str:
    return measurement.precisions.get(component, measurement.precision)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
