"""Draws docs/peers.svg: how long others take for the picture that sd-toolkit draws.

python docs/peers.py docs/peers.svg "TITLE=RUN.json,RUN.json" …

Each RUN is what `sd-bench peers --output` wrote; every bar is a ratio within one run.
"""

import json
import sys
from pathlib import Path
from statistics import median

from sd_bench.plots import COLORS, new_axes, new_figure, save_figure

output, *panels = sys.argv[1:]
figure = new_figure(width=3.6 * len(panels), height=2.2)
for number, panel in enumerate(panels, start=1):
    title, _, names = panel.partition("=")
    runs = [json.loads(Path(name).read_text("utf-8")) for name in names.split(",")]
    bars: dict[str, tuple[float, float]] = {}
    for run in runs:
        for row in run["rows"]:
            if row["state"] == "measured":
                name = row["name"].removesuffix(f"-{row['precision']}")
                bars.setdefault(name, (row["ratio"]["median"], median(row["warm_ms"]) / 1e3))
    ordered = sorted(bars.items(), key=lambda bar: -bar[1][0])
    axes = new_axes(
        figure, title=title, x_label="÷ sd-toolkit", y_label="", position=(1, len(panels), number)
    )
    for place, (name, (ratio, seconds)) in enumerate(ordered):
        color = COLORS[0] if name == "sd-toolkit" else COLORS[5]
        axes.barh(place, ratio, color=color, height=0.65)
        axes.text(ratio, place, f" {ratio:.2f} × ({seconds:.3g} s)", va="center", fontsize=8)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    axes.set_xlim(0, 1.5 * max(ratio for ratio, _ in bars.values()))
    axes.grid(visible=False, axis="y")
save_figure(figure, Path(output))
