"""``sd-bench latency``, the question where the time goes, answered by stage."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from sd_bench.commands.compare import FILE, check_files
from sd_bench.commands.finite_range import FiniteRange
from sd_bench.commands.request import given, prompt_options, request_options
from sd_engines.border import check_package

if TYPE_CHECKING:
    from pathlib import Path

    from sd_bench.latency import Sampler
    from sd_bench.measurement import Sample


@click.command()
@click.argument("bundle", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE.json")
@prompt_options
@request_options()
@click.option("--num-images", type=int, default=1, show_default=True, help="Pictures a request.")
@click.option(
    "--warm-up", type=click.IntRange(min=0), default=2, show_default=True, help="Runs not counted."
)
@click.option(
    "--runs", type=click.IntRange(min=1), default=10, show_default=True, help="At least so many."
)
@click.option(
    "--duration", type=FiniteRange(min=0), default=0.0, help="And at least so many seconds."
)
@click.option(
    "--cold-starts",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="New sd-run processes to their first picture.",
)
@click.option("--trace", type=FILE, metavar="FILE.json", help="Opens in ui.perfetto.dev.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
def latency(
    *,
    bundle: Path,
    output: Path,
    warm_up: int,
    runs: int,
    duration: float,
    cold_starts: int,
    trace: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Time requests to BUNDLE by stage, beside what this machine reaches at its best.

    A request is from its text to its PNG in memory; its prompts are encoded anew each time.
    FILE.json holds every sample, for sd-bench compare and gate.
    """
    from sd_bench.latency import measure_latency
    from sd_bench.measurement import Settings
    from sd_bench.summary import report, table
    from sd_bench.trace import Trace
    from sd_runtime.files import write_files

    check_package("onnx", extra="bench")
    check_files(output, trace)
    drawn = Trace(f"sd-bench latency {bundle}")

    def on_sample(sampler: Sampler, sample: Sample) -> None:
        drawn.add(sampler.timings)
        if sys.stderr.isatty():
            click.echo(f"{sample.started_s:9.1f} s  {sample.stages_ms['total']:.1f} ms", err=True)

    measurement = measure_latency(
        bundle,
        Settings(**given(settings)),
        warm_up=warm_up,
        runs=runs,
        duration_s=duration,
        cold_starts=cold_starts,
        ceilings=True,
        on_sample=on_sample,
    )
    files = {output: measurement.to_json()}
    if trace is not None:
        files[trace] = drawn.to_json()
    write_files({path: text.encode() for path, text in files.items()})
    click.echo(json.dumps(report(measurement)) if as_json else table(measurement))
    if not as_json:
        click.echo(f"Written: {', '.join(map(str, files))}", err=True)
