"""``sd-bench scaling``, the question what one step, picture or request more costs."""

from __future__ import annotations

import json
from functools import partial
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sd_bench.commands.compare import check_files
from sd_bench.commands.request import request_options
from sd_engines.border import check_package

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_bench.line import Line
    from sd_bench.scaling import Scaling

_MIB = 2**20
_COUNT = click.IntRange(min=1)
_FILE = click.Path(dir_okay=False, path_type=Path)


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    """Whole numbers above 0, parted by commas."""
    words = [word.strip() for word in value.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise click.BadParameter(f"{value!r} is no list of whole numbers such as 1,2,4", ctx, param)
    return [int(word) for word in words]


_counts = partial(click.option, callback=_numbers, metavar="N,N,…", show_default=True)


@click.command()
@click.argument("bundles", metavar="BUNDLE…", nargs=-1, required=True, type=click.Path())
@_counts("--steps", default="5,10,20,40", help="Steps per picture.")
@_counts("--images", default="1,2,3,4", help="Pictures per request.")
@_counts("--requests", default="1,2,3,4", help="At once, in threads of one process.")
@request_options()
@click.option("--runs", type=_COUNT, default=7, show_default=True, help="Requests timed per load.")
@click.option(
    "--memory-runs", type=_COUNT, default=3, show_default=True, help="Processes per load."
)
@click.option("--plot", type=_FILE, help="Draw points and lines to this .svg, .png or .pdf.")
@click.option("--output", type=_FILE, help="Write every sample to this .json.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def scaling(
    *,
    bundles: Sequence[str],
    steps: list[int],
    images: list[int],
    requests: list[int],
    runs: int,
    memory_runs: int,
    plot: Path | None,
    output: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Fit how time and memory grow with steps, pictures, requests at once, and picture size.

    Picture size needs a bundle of several sizes, or several of one checkpoint, of which the first
    is measured along all axes.
    What an axis does not vary is one picture, one request, and --num-inference-steps.
    """
    from sd_bench.measurement import Settings
    from sd_bench.plots import SUFFIXES, save_figure
    from sd_bench.scaling import measure_scaling, scaling_axes
    from sd_bench.scaling_figure import scaling_figure
    from sd_engines.errors import ConfigError
    from sd_runtime.files import write_files

    if plot is not None:
        check_package("matplotlib", extra="bench")
    check_files(plot, output)
    if plot is not None and plot.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{plot} is no figure", f"Name a file ending in {', '.join(SUFFIXES)}.")
    axes = scaling_axes(
        bundles, Settings(**settings), steps=steps, images=images, requests=requests
    )
    found = measure_scaling(
        axes,
        runs=runs,
        memory_runs=memory_runs,
        on_turn=lambda words: click.echo(words, err=True),
    )
    if output is not None:
        write_files({output: found.to_json().encode()})
    click.echo(json.dumps(found.summary()) if as_json else _sentences(found, runs=runs))
    if plot is not None:
        save_figure(scaling_figure(found), plot)


def _sentences(found: Scaling, *, runs: int) -> str:
    lines = [f"{found.backend} {found.precision}, medians of {runs}"]
    for axis in found.axes:
        time, memory = found.time_line(axis), found.memory_line(axis)
        peaks_mib = [peak / _MIB for peak in found.peaks_bytes(axis)]
        lines += [
            "",
            _row(axis.name, list(axis.loads)),
            _row("  ms per request", found.totals_ms(axis)),
            _row("  pictures/s", found.pictures_per_s(axis)),
            _row("  peak memory, MiB", peaks_mib),
            f"  time    {_formula(time, 'ms', axis.unit)}",
            f"  memory  {_formula(memory, 'MiB', axis.unit, scale=_MIB)}",
        ]
    return "\n".join(lines)


def _row(name: str, numbers: Sequence[float]) -> str:
    return f"{name:<26}" + "".join(f"{number:>10.5g}" for number in numbers)


def _formula(line: Line, unit: str, per: str, *, scale: float = 1.0) -> str:
    fixed = _figure(line.fixed, line.fixed_error, scale)
    per_unit = _figure(abs(line.per_unit), line.per_unit_error, scale)
    sign = "−" if line.per_unit < 0 else "+"
    fit = "" if line.r_squared is None else f"; R² {line.r_squared:.4f}"
    return f"{fixed} {sign} {per_unit} {unit} per {per}{fit}, off by {line.residual / scale:.3g}"


def _figure(value: float, error: float | None, scale: float) -> str:
    """``value`` to the second digit of its standard error; four digits where it has none."""
    if not error:
        return f"{value / scale:.4g}"
    places = max(0, 1 - floor(log10(error / scale)))
    return f"{value / scale:.{places}f} ± {error / scale:.{places}f}"
