"""A comparison drawn: distributions, samples over time, the steps' waterfall, and ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sd_bench.comparison import stage_ms
from sd_bench.plots import COLORS, new_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sd_bench.comparison import Comparison
    from sd_bench.measurement import Measurement

BASE, NEW, LIMIT = COLORS[0], COLORS[1], "#b00020"


def comparison_figures(comparison: Comparison) -> dict[str, Figure]:
    """Every figure of the report by its heading, in the report's order."""
    stage = comparison.judgement.criterion.stage
    return {
        "Change by stage": ratio_figure(comparison),
        f"Distribution of {stage}": distribution_figure(comparison),
        f"{stage.capitalize()}, sample by sample": time_figure(comparison),
        "Waterfall of one picture": waterfall_figure(comparison),
    }


def ratio_figure(comparison: Comparison) -> Figure:
    """Each stage's ratio with its interval, beside no change and what is allowed."""
    stages = list(comparison.stages)
    figure = new_figure(height=1.2 + 0.28 * len(stages))
    axes = new_axes(figure, title="", x_label="change of the median, %", y_label="")
    allowed = 100 * comparison.judgement.criterion.allowed_regression
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(allowed, color=LIMIT, linestyle="--", linewidth=1, label=f"allowed {allowed:g} %")
    for row, stage in enumerate(stages):
        ratio = comparison.stages[stage].ratio
        value, low, high = (100 * (x - 1) for x in (ratio.value, ratio.low, ratio.high))
        judged = stage == comparison.judgement.criterion.stage
        color = NEW if judged else "#777777"
        axes.plot([low, high], [row, row], color=color, linewidth=3 if judged else 1.5)
        axes.plot(value, row, "o", color=color, markersize=7 if judged else 5)
    axes.set_yticks(range(len(stages)), stages)
    axes.set_ylim(len(stages) - 0.4, -0.6)
    _clip_to(axes, comparison)
    _legend(axes)
    return figure


def _clip_to(axes: Axes, comparison: Comparison) -> None:
    """Let a stage of microseconds, whose interval is wide, not hide the one that is judged."""
    ratio = comparison.judgement.ratio
    allowed = comparison.judgement.criterion.allowed_regression
    reach = 300 * max(abs(ratio.low - 1), abs(ratio.high - 1), allowed, 0.02)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -reach), min(high, reach))


def distribution_figure(comparison: Comparison) -> Figure:
    """Histograms of the judged stage on common bins, medians marked."""
    stage = comparison.judgement.criterion.stage
    figure = new_figure()
    axes = new_axes(figure, title="", x_label=f"{stage}, ms", y_label="samples")
    sides = [stage_ms(side.samples, stage) for side in (comparison.base, comparison.new)]
    bins = np.histogram_bin_edges(np.concatenate(sides), bins=30)
    for name, color, values in zip(("base", "new"), (BASE, NEW), sides, strict=True):
        median = float(np.median(values))
        axes.hist(values, bins=bins.tolist(), color=color, alpha=0.45)
        axes.axvline(median, color=color, linewidth=2, label=f"{name}, median {median:.4g} ms")
    _legend(axes)
    return figure


def time_figure(comparison: Comparison) -> Figure:
    """The judged stage over time, in which drifts and disturbances show."""
    stage = comparison.judgement.criterion.stage
    figure = new_figure()
    label = "s since the first" if comparison.judgement.paired else "s since the first of its run"
    axes = new_axes(figure, title="", x_label=label, y_label=f"{stage}, ms")
    for name, color, side in _sides(comparison):
        times = [sample.started_s for sample in side.samples]
        axes.plot(
            times,
            stage_ms(side.samples, stage),
            "o-",
            color=color,
            markersize=3,
            linewidth=0.7,
            label=name,
        )
    _legend(axes)
    return figure


def waterfall_figure(comparison: Comparison) -> Figure:
    """Medians of each stage and UNet step in the order they run, each from the last one's end."""
    bars = [_waterfall(side) for _, _, side in _sides(comparison)]
    rows = list(dict.fromkeys(name for side in bars for name in side))
    figure = new_figure(height=1.2 + 0.26 * len(rows))
    axes = new_axes(figure, title="", x_label="ms", y_label="")
    for (name, color, _), offset, side in zip(_sides(comparison), (-0.2, 0.2), bars, strict=True):
        axes.barh(
            [rows.index(bar) + offset for bar in side],
            [length for _, length in side.values()],
            height=0.38,
            left=[left for left, _ in side.values()],
            color=color,
            label=name,
        )
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    _legend(axes)
    return figure


def _waterfall(measurement: Measurement) -> dict[str, tuple[float, float]]:
    """Name → where its bar begins and how long it is, ms; what no stage holds is at the end."""
    samples = measurement.samples
    names = [name for name in samples[0].stages_ms if name != "total"]
    lengths: dict[str, float] = {}
    for name in names:
        if name == "unet" and samples[0].unet_steps_ms:
            count = min(len(sample.unet_steps_ms) for sample in samples)
            steps = np.median([sample.unet_steps_ms[:count] for sample in samples], axis=0)
            lengths |= {f"unet {index + 1}": float(step) for index, step in enumerate(steps)}
        else:
            lengths[name] = float(np.median([s.stages_ms.get(name, 0.0) for s in samples]))
    total = float(np.median([sample.stages_ms["total"] for sample in samples]))
    lengths["rest"] = max(0.0, total - sum(lengths.values()))
    ends = np.cumsum(list(lengths.values()))
    return {
        name: (float(end) - length, length)
        for (name, length), end in zip(lengths.items(), ends, strict=True)
    }


def _sides(comparison: Comparison) -> list[tuple[str, str, Measurement]]:
    return [("base", BASE, comparison.base), ("new", NEW, comparison.new)]


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False)
