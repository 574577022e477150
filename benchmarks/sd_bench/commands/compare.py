"""``sd-bench compare``, the question whether one measurement is slower than another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sd_bench.commands.finite_range import FiniteRange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sd_bench.comparison import Comparison
    from sd_bench.judgement import Criterion

    Command = TypeVar("Command", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)


def criterion_options(command: Command) -> Command:
    """What `compare` and `gate` ask alike: what is judged, how, and where the answer goes."""
    for option in reversed(
        (
            click.option("--stage", default="total", show_default=True, help="Or unet_step, …"),
            click.option(
                "--allowed-regression",
                type=FiniteRange(min=0),
                metavar="PERCENT",
                help="[default: 2.5 for samples taken in turns, 5 for two runs apart]",
            ),
            click.option(
                "--confidence",
                type=FiniteRange(50, 99.9),
                default=98.0,
                show_default=True,
                metavar="PERCENT",
                help="Of the interval, two-sided.",
            ),
            click.option("--strict", is_flag=True, help="Exit 1 where it is INCONCLUSIVE, too."),
            click.option(
                "--github",
                type=FILE,
                metavar="FILE.json",
                help="For github-action-benchmark, as customSmallerIsBetter.",
            ),
            click.option("--html", type=FILE, metavar="FILE.html", help="A report with figures."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        )
    ):
        command = option(command)
    return command


@click.command()
@click.argument("base", type=FILE)
@click.argument("new", type=FILE)
@criterion_options
def compare(
    base: Path,
    new: Path,
    *,
    stage: str,
    allowed_regression: float | None,
    confidence: float,
    strict: bool,
    github: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Judge NEW.json by BASE.json, two files of sd-bench latency.

    Exits 1 where NEW is slower for sure: the interval of its change lies beyond what is allowed.
    INCONCLUSIVE, where the samples cannot tell, is a warning.
    """
    from sd_bench.comparison import compare as compare_measurements
    from sd_bench.measurement import read_measurement

    criterion = criterion_of(stage, allowed_regression, confidence, paired=False)
    check_files(github, html)
    comparison = compare_measurements(read_measurement(base), read_measurement(new), criterion)
    deliver(comparison, strict=strict, github=github, html=html, as_json=as_json)


def criterion_of(
    stage: str, allowed_percent: float | None, confidence_percent: float, *, paired: bool
) -> Criterion:
    """The criterion in the options' percents; `ConfigError` for what it refuses."""
    from sd_bench.judgement import ALLOWED_APART, ALLOWED_IN_PAIRS, Criterion

    default = ALLOWED_IN_PAIRS if paired else ALLOWED_APART
    return Criterion(
        stage=stage,
        allowed_regression=default if allowed_percent is None else allowed_percent / 100,
        confidence=round(confidence_percent / 100, 9),  # 99.9 / 100 is above 0.999
    )


def check_files(*paths: Path | None) -> None:
    """`ConfigError`, before anything is measured, for what could not be written, or is twice."""
    from sd_engines.errors import ConfigError
    from sd_runtime.files import check_writable

    found: set[Path] = set()
    for path in filter(None, paths):
        check_writable(path)
        if path.resolve() in found:
            raise ConfigError(f"{path} is named for two files", "Name each by itself.")
        found.add(path.resolve())


def deliver(
    comparison: Comparison,
    *,
    strict: bool,
    github: Path | None,
    html: Path | None,
    as_json: bool,
    others: Sequence[tuple[Path, str]] = (),
) -> None:
    """Print the comparison, write its files and those of ``others``; exit 1 where it fails."""
    from sd_bench.comparison_report import github_benchmarks, report, table
    from sd_bench.judgement import Verdict
    from sd_runtime.files import write_files

    files = dict(others)
    if github is not None:
        files[github] = json.dumps(github_benchmarks(comparison), indent=1, ensure_ascii=False)
    if html is not None:
        from sd_bench.comparison_page import page

        files[html] = page(comparison)
    write_files({path: text.encode() for path, text in files.items()})
    click.echo(json.dumps(report(comparison)) if as_json else table(comparison))
    if files and not as_json:
        click.echo(f"Written: {', '.join(map(str, files))}", err=True)
    verdict = comparison.judgement.verdict
    if verdict is Verdict.FAIL or (strict and verdict is Verdict.INCONCLUSIVE):
        click.get_current_context().exit(1)
    if verdict is Verdict.INCONCLUSIVE:
        click.echo("Warning: INCONCLUSIVE is no PASS; --strict makes it exit 1.", err=True)
