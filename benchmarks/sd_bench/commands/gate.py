"""``sd-bench gate``, the question whether a bundle has become slower, asked of the machine now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sd_bench.commands.compare import FILE, check_files, criterion_of, criterion_options, deliver
from sd_bench.commands.request import given, request_options
from sd_engines.border import check_package
from sd_runtime.command import progress_bar

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sd_bench.comparison import Comparison
    from sd_bench.judgement import Criterion, Judgement


@click.command()
@click.argument("base", type=FILE)
@click.argument("bundle", type=FILE)
@request_options(optional=True)
@click.option("--num-images", type=int, help="Pictures a request. [default: 1]")
@click.option(
    "--base-python",
    type=FILE,
    metavar="PYTHON",
    help="Interpreter of another environment, whose sd-toolkit and packages run BASE.",
)
@click.option(
    "--max-pairs",
    type=click.IntRange(min=32),
    help="At most, where BASE is a bundle; a multiple of 4. [default: 240]",
)
@click.option(
    "--runs",
    type=click.IntRange(min=8),
    help="Where BASE is a file. [default: as many as it holds, 20 at least]",
)
@click.option("-o", "--output", type=FILE, metavar="FILE.json", help="Keep BUNDLE's samples here.")
@criterion_options
def gate(
    base: Path,
    bundle: Path,
    *,
    base_python: Path | None,
    max_pairs: int | None,
    runs: int | None,
    output: Path | None,
    stage: str,
    allowed_regression: float | None,
    confidence: float,
    strict: bool,
    github: Path | None,
    html: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure BUNDLE and judge it by BASE; exits 1 where BUNDLE is slower for sure.

    BASE is another bundle: both answer in turns, A B B A, in processes that are opened anew after
    every four pairs, until the interval is narrow enough. A slowdown of twice what is allowed is
    caught in 95 of 100 runs, and no change alarms in at most 2. With --base-python, another
    version of the toolkit runs it.

    Or BASE is a file of sd-bench latency, made here with the same packages: BUNDLE is measured
    with its settings, and what the machine does differently since then is judged along.
    """
    from sd_engines.errors import ConfigError

    settings = given(options)
    in_turns = base.is_dir()
    pairs_only = {**settings, "max_pairs": max_pairs, "base_python": base_python}
    surplus = given({"runs": runs} if in_turns else pairs_only)
    if surplus:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in surplus)
        raise ConfigError(
            f"{names} with BASE {base}",
            "Leave it out: two bundles take turns until the interval is narrow enough."
            if in_turns
            else "Leave it out: a file brings its own settings and number of runs.",
        )
    criterion = criterion_of(stage, allowed_regression, confidence, paired=in_turns)
    if html is not None:
        check_package("matplotlib", extra="bench")
    check_files(output, github, html)
    if in_turns:
        comparison = _gate_in_turns(
            base,
            bundle,
            criterion,
            settings=settings,
            base_python=base_python,
            max_pairs=max_pairs,
        )
    else:
        comparison = _gate_by_file(base, bundle, criterion, runs)
    kept = [] if output is None else [(output, comparison.new.to_json())]
    deliver(comparison, strict=strict, github=github, html=html, as_json=as_json, others=kept)


def _gate_in_turns(
    base: Path,
    bundle: Path,
    criterion: Criterion,
    *,
    settings: Mapping[str, Any],
    base_python: Path | None,
    max_pairs: int | None,
) -> Comparison:
    from sd_bench.gate import MAX_PAIRS, gate_in_turns
    from sd_bench.measurement import Settings

    most = MAX_PAIRS if max_pairs is None else max_pairs
    with progress_bar(most, "Pairs at most") as bar:

        def on_pair(count: int, judgement: Judgement | None) -> None:
            if bar is not None:
                bar.update(1)

        return gate_in_turns(
            base,
            bundle,
            criterion,
            settings=Settings(**settings),
            base_python=base_python,
            max_pairs=most,
            on_pair=on_pair,
        )


def _gate_by_file(base: Path, bundle: Path, criterion: Criterion, runs: int | None) -> Comparison:
    from sd_bench.gate import gate_by_file, usual_runs
    from sd_bench.measurement import read_measurement

    measurement = read_measurement(base)
    count = runs or usual_runs(measurement)
    with progress_bar(count, "Runs") as bar:

        def on_sample(count: int) -> None:
            if bar is not None:
                bar.update(1)

        return gate_by_file(measurement, bundle, criterion, runs=count, on_sample=on_sample)
