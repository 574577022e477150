"""A comparison in words, as JSON, and in the format of github-action-benchmark."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sd_bench.comparison import stage_ms
from sd_bench.judgement import Verdict
from sd_bench.text_table import aligned

if TYPE_CHECKING:
    from sd_bench.comparison import Comparison
    from sd_bench.judgement import Judgement
    from sd_bench.measurement import Measurement

_COLUMNS: Final = ("Median, ms", "base", "new", "change", "interval")
_LATER: Final = {
    Verdict.PASS: (),
    Verdict.FAIL: ("The stages below say where; run it again before you believe a single figure.",),
    Verdict.INCONCLUSIVE: ("The samples cannot tell: take more, or wait for a quieter machine.",),
}
"""Lines below the headline."""


def headline(comparison: Comparison) -> str:
    """The verdict in one line: "FAIL: total +6.1 % (+4.9 to +7.3 %), +2.5 % allowed"."""
    judged = comparison.judgement
    criterion = judged.criterion
    return (
        f"{judged.verdict}: {criterion.stage} {change_text(judged)} ({interval_text(judged)}), "
        f"{_percent(1 + criterion.allowed_regression)} allowed"
    )


def table(comparison: Comparison) -> str:
    """The verdict and every stage for people, aligned."""
    base, new = comparison.base, comparison.new
    confidence = f"{comparison.judgement.criterion.confidence:.3g}"
    rows = [_COLUMNS]
    for stage, judged in comparison.stages.items():
        times = f"{judged.base_ms:.3f}", f"{judged.new_ms:.3f}"
        rows.append((stage, *times, change_text(judged), interval_text(judged)))
    lines = [
        headline(comparison),
        *_LATER[comparison.judgement.verdict],
        f"base  {_side(base)}",
        f"new   {_side(new)}",
        f"{samples_text(comparison)}; {base.settings.words}; confidence {confidence}",
        "",
        *aligned(rows),
    ]
    lines += ["", *(f"Note: {note}." for note in comparison.notes)] if comparison.notes else []
    return "\n".join(lines)


def report(comparison: Comparison) -> dict[str, Any]:
    """All figures as one JSON object, without the samples. Ratios are new over base."""
    return {
        "verdict": comparison.judgement.verdict,
        "stage": comparison.judgement.criterion.stage,
        "allowed_regression": comparison.judgement.criterion.allowed_regression,
        "confidence": comparison.judgement.criterion.confidence,
        "paired": comparison.judgement.paired,
        "ratio": asdict(comparison.judgement.ratio),
        "base": _side_report(comparison.base),
        "new": _side_report(comparison.new),
        "settings": asdict(comparison.base.settings),
        "stages": {
            stage: {
                "base_ms": judged.base_ms,
                "new_ms": judged.new_ms,
                "ratio": asdict(judged.ratio),
                "verdict": judged.verdict,
            }
            for stage, judged in comparison.stages.items()
        },
        "notes": list(comparison.notes),
    }


def github_benchmarks(comparison: Comparison) -> list[dict[str, Any]]:
    """What github-action-benchmark reads as "customSmallerIsBetter": the new medians, in ms.

    The range is half the distance between the quartiles. Names stay the same from run to run, for
    the action draws each name's history.
    """
    new = comparison.new
    subject = f"{PurePath(new.bundle).name} {new.backend} {new.precision}"
    entries = []
    for stage, judged in comparison.stages.items():
        low, high = np.percentile(stage_ms(new.samples, stage), [25, 75])
        extra = (
            f"base {judged.base_ms:.3f} ms, change {change_text(judged)} ({interval_text(judged)})"
        )
        if stage == comparison.judgement.criterion.stage:
            extra = f"{headline(comparison)}\n{extra}"
        entries.append(
            {
                "name": f"{subject}: {stage}",
                "unit": "ms",
                "value": judged.new_ms,
                "range": f"± {(high - low) / 2:.3g}",
                "extra": extra,
            }
        )
    return entries


def change_text(judged: Judgement) -> str:
    """The ratio as "+6.1 %"."""
    return _percent(judged.ratio.value)


def interval_text(judged: Judgement) -> str:
    """The interval as "+4.9 to +7.3 %"."""
    return f"{_percent(judged.ratio.low).removesuffix(' %')} to {_percent(judged.ratio.high)}"


def samples_text(comparison: Comparison) -> str:
    """How many samples there are, and how they were taken."""
    base, new = len(comparison.base.samples), len(comparison.new.samples)
    if comparison.judgement.paired:
        return f"{base} pairs, taken in turns (A B B A)"
    return f"{base} samples, then {new} in another run"


def _side(measurement: Measurement) -> str:
    return (
        f"{measurement.bundle}  {measurement.backend} {measurement.precision}  "
        f"{measurement.fingerprint[:10]}  {measurement.measured_at}"
    )


def _side_report(measurement: Measurement) -> dict[str, Any]:
    return {
        "bundle": measurement.bundle,
        "fingerprint": measurement.fingerprint,
        "backend": measurement.backend,
        "precision": measurement.precision,
        "measured_at": measurement.measured_at,
        "samples": len(measurement.samples),
        "peak_memory_bytes": measurement.peak_memory_bytes,
        "environment": dict(measurement.environment),
    }


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"
