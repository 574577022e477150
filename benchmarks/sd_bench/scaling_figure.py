"""The figure of `sd-bench scaling`: a column an axis, time above memory, samples and their line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_bench.plots import COLORS, new_axes, new_figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sd_bench.line import Line
    from sd_bench.scaling import Scaling

_MIB = 2**20


def scaling_figure(scaling: Scaling) -> Figure:
    """Draw ``scaling``: every sample faint, medians solid, the fitted line from zero on."""
    count = len(scaling.axes)
    figure = new_figure(width=3.3 * max(count, 2), height=5.6)
    for column, axis in enumerate(scaling.axes, start=1):
        at = list(axis.loads)
        time = new_axes(
            figure,
            title="Time" if column == 1 else "",
            x_label=axis.name,
            y_label="ms per request" if column == 1 else "",
            position=(2, count, column),
        )
        for x, load in axis.loads.items():
            totals_ms = scaling.observations[load].totals_ms
            time.plot([x] * len(totals_ms), totals_ms, ".", color=COLORS[0], alpha=0.25)
        _draw(time, at, scaling.totals_ms(axis), scaling.time_line(axis), unit=axis.unit)
        memory = new_axes(
            figure,
            title="Memory" if column == 1 else "",
            x_label=axis.name,
            y_label="peak memory, MiB" if column == 1 else "",
            position=(2, count, count + column),
        )
        peaks_mib = [peak / _MIB for peak in scaling.peaks_bytes(axis)]
        _draw(memory, at, peaks_mib, scaling.memory_line(axis), unit=axis.unit, scale=_MIB)
    return figure


def _draw(
    axes: Axes, x: Sequence[float], y: Sequence[float], line: Line, *, unit: str, scale: float = 1.0
) -> None:
    ends = (0.0, max(x))
    fixed, per_unit = line.fixed / scale, line.per_unit / scale
    label = f"{fixed:.3g} {'−' if per_unit < 0 else '+'} {abs(per_unit):.3g} per {unit}"
    axes.plot(ends, [fixed + per_unit * end for end in ends], color=COLORS[1], label=label)
    axes.plot(x, y, "o", color=COLORS[0], markersize=4)
    axes.set_xlim(0, 1.05 * max(x))
    axes.set_ylim(0, 1.25 * max(y))
    axes.legend(loc="lower right", fontsize=8, frameon=False)
