"""Figures of the instruments' reports: one look, no windows, no state shared between them.

Figures are made without pyplot, so a library's caller keeps their own settings and back end.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final

from sd_engines.border import import_package
from sd_engines.errors import ConfigError, SdError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette (2008), told apart by colour-blind readers too; the first is a base."""
SUFFIXES: Final = (".png", ".svg", ".pdf")
_INK: Final = "#444444"


def new_figure(*, width: float = 7.5, height: float = 3.6) -> Figure:
    """An empty figure of ``width`` × ``height`` inches; `new_axes` adds what is drawn on.

    Raises `BackendError` where matplotlib is not installed.
    """
    made: Figure = import_package("matplotlib.figure", extra="bench").Figure(
        figsize=(width, height), layout="constrained"
    )
    return made


def new_axes(
    figure: Figure,
    *,
    title: str,
    x_label: str,
    y_label: str,
    position: tuple[int, int, int] = (1, 1, 1),
) -> Axes:
    """Axes in the reports' look; ``position`` is rows, columns and index, from 1, as in pyplot."""
    axes = figure.add_subplot(*position)
    axes.set_title(title, loc="left", fontsize=10, color="black")
    axes.set_xlabel(x_label, fontsize=9, color=_INK)
    axes.set_ylabel(y_label, fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def svg_from_figure(figure: Figure) -> str:
    """An ``<svg>`` element to put into a page: no prolog, no date, nothing fetched from anywhere.

    The same figure gives the same text.
    """
    rc_context = import_package("matplotlib", extra="bench").rc_context
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": "sd-bench"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :].strip()


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path``, PNG, SVG or PDF by its suffix.

    Raises `ConfigError` for another suffix, `SdError` where the disk refuses.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"{path}: no figure is written as {path.suffix or 'a file without suffix'!r}",
            f"Name a file ending in {', '.join(SUFFIXES)}.",
        )
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise SdError(f"{path} cannot be written: {error}", "Name another place.") from error
