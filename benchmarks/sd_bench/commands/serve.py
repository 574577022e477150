"""``sd-bench serve``, the question what a server adds, and how it bears load."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sd_bench.commands.finite_range import FiniteRange
from sd_bench.commands.request import request_options
from sd_bench.measurement import PROMPT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sd_bench.served import Load


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--clients", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--seconds", type=FiniteRange(min=1), default=30.0, show_default=True)
@click.option("--rounds", type=click.IntRange(min=10), default=100, show_default=True)
@request_options(
    without=("guidance_start", "guidance_stop", "height", "width"), num_inference_steps=4
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def serve(
    bundle: Path,
    clients: int,
    seconds: float,
    rounds: int,
    backend: str,
    precision: Any,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve BUNDLE, and load the server: CLIENTS at once, then 4 times what it takes at most.

    They ask for pictures of one to four times as many steps, in turn.
    """
    from statistics import median
    from tempfile import TemporaryDirectory

    from sd_bench.measurable import measurable_bundle
    from sd_bench.served import ServerProcess, overhead_ms, put_under_load
    from sd_runtime import Pipeline, Request
    from sd_runtime.command import raise_received_signal

    def say(words: str) -> None:
        if not as_json:
            click.echo(words)

    def announce(words: str) -> None:
        if sys.stderr.isatty():
            click.echo(words, err=True)

    steps = options.pop("num_inference_steps")
    requests = [
        Request(PROMPT, seed=seed, num_inference_steps=steps * (1 + seed % 4), **options)
        for seed in range(8)
    ]
    chosen = {"--backend": backend, "--precision": precision, "--threads": threads}
    arguments = [f"{name}={value}" for name, value in chosen.items() if value is not None]
    with Pipeline.load(
        measurable_bundle(bundle), backend=backend, precision=precision, threads=threads
    ) as pipeline:
        expected = []
        for request in requests:
            raise_received_signal()
            expected.append(pipeline.generate(request).pixels[0])
    with (
        TemporaryDirectory() as folder,
        ServerProcess(
            bundle, log=Path(folder, "log"), queue_size=clients, options=arguments
        ) as server,
    ):
        added_ms = median(overhead_ms(server, requests[0], rounds=rounds))
        report: dict[str, Any] = {"overhead_ms": {"p50": round(added_ms, 2), "rounds": rounds}}
        say(f"HTTP adds {added_ms:.2f} ms (p50 of {rounds}) to the drawing and the PNG")
        for name, number in (("load", clients), ("overload", 4 * (clients + 1))):
            announce(f"{number} clients, for {seconds:g} s and what they then wait for …")
            load = put_under_load(server, requests, expected, clients=number, seconds=seconds)
            report[name] = load.to_json()
            say(_words(load))
    if as_json:
        click.echo(json.dumps(report))


def _words(load: Load) -> str:
    figures = load.to_json()
    return "\n".join(
        (
            f"{load.clients} clients, {load.seconds:.0f} s: {figures['drawn']} pictures drawn, "
            f"{load.wrong} wrong, {load.differing} with values off by 1; {load.failed} failed",
            f"  drawn, ms: {_spread_words(figures['drawn_ms'])}",
            f"  refused: {figures['refused']}, ms: {_spread_words(figures['refused_ms'])}",
            f"  memory, MB, by quarters: {_megabytes(load.resident_bytes)}",
            *([f"  on GPUs: {_megabytes(load.gpu_bytes)}"] if any(load.gpu_bytes) else []),
        )
    )


def _spread_words(spread: Mapping[str, float] | None) -> str:
    return ", ".join(f"{name} {ms:g}" for name, ms in spread.items()) if spread else "–"


def _megabytes(sizes: Sequence[int]) -> str:
    return ", ".join(f"{size / 1e6:.0f}" for size in sizes)
