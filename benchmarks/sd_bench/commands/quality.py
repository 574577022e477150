"""``sd-bench quality``, the question whether a bundle draws what captions ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sd_bench.commands.request import request_options
from sd_engines.border import check_package
from sd_engines.errors import ConfigError
from sd_runtime.command import fresh_line, progress_bar

if TYPE_CHECKING:
    from sd_bench.quality import Answer, Score


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--captions", type=click.IntRange(1), default=200, show_default=True)
@request_options(num_inference_steps=50, guidance_scale=3.0)
@click.option("--pictures", type=click.Path(path_type=Path), help="Save every picture here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def quality(
    bundle: Path,
    captions: int,
    backend: str,
    precision: Any,
    threads: int | None,
    pictures: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Score how well a bundle of the shipped checkpoint obeys held-out captions."""
    check_package("scipy", extra="bench")
    from sd_bench.measurable import measurable_bundle
    from sd_bench.quality import measure_quality
    from sd_runtime import Pipeline

    if pictures is not None:
        if pictures.exists() and not pictures.is_dir():
            raise ConfigError(f"{pictures} is no folder", "Name one, which is made if need be.")
        pictures.mkdir(parents=True, exist_ok=True)

    def on_answer(answer: Answer) -> None:
        if answer.faults:
            words = f"{answer.seed:4} {answer.prompt}: {'; '.join(map(str, answer.faults))}"
            click.echo(f"{fresh_line()}{words}", err=True)
        if bar is not None:
            bar.update(1)
        if pictures is not None:
            answer.image.save(pictures / f"{answer.seed:04}{'-wrong' * bool(answer.faults)}.png")

    with (
        Pipeline.load(
            measurable_bundle(bundle), backend=backend, precision=precision, threads=threads
        ) as pipeline,
        progress_bar(captions, "Captions") as bar,
    ):
        score = measure_quality(pipeline, options, captions=captions, on_answer=on_answer)
    click.echo(json.dumps(_report(score)) if as_json else _sentences(score))


def _report(score: Score) -> dict[str, object]:
    from sd_bench.quality import fault_kinds

    return {
        "captions": len(score.answers),
        "obeyed": score.share,
        "interval_95": score.interval(),
        "obeyed_by_number_of_shapes": {n: score.share_with(shapes=n) for n in (1, 2, 3)},
        "obeyed_with_unseen_pair": score.share_with_unseen_pair(),
        "faults": dict(fault_kinds(score)),
        "seconds_per_picture": score.seconds / len(score.answers),
    }


def _sentences(score: Score) -> str:
    from sd_bench.quality import fault_kinds

    low, high = score.interval()
    by_shapes = ", ".join(f"{n}: {_percent(score.share_with(shapes=n))}" for n in (1, 2, 3))
    counted = ", ".join(f"{kind} {n}" for kind, n in fault_kinds(score).most_common())
    return (
        f"{score.share:.1%} of {len(score.answers)} held-out captions fully right "
        f"(95 % interval {low:.1%} to {high:.1%})\n"
        f"by number of shapes  {by_shapes}\n"
        f"with a colour and shape never seen together  {_percent(score.share_with_unseen_pair())}\n"
        f"faults  {counted or 'none'}\n"
        f"{score.seconds / len(score.answers):.2f} s a picture"
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
