"""``sd-bench``: the command line of the instruments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sd_runtime.command import run_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_bench.quality import Answer, Score


_PROMPT = "a large red circle on the left and a small blue star in the top right"


@click.group("sd-bench", context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Measure a bundle."""


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--captions", type=click.IntRange(1), default=200, show_default=True)
@click.option("--num-inference-steps", type=int, default=50, show_default=True)
@click.option("--guidance-scale", type=float, default=7.5, show_default=True)
@click.option("--scheduler", help="Any name of sd-run; default: the checkpoint's own.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--pictures", type=click.Path(path_type=Path), help="Save every picture here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def quality(
    bundle: Path,
    captions: int,
    num_inference_steps: int,
    guidance_scale: float,
    scheduler: str | None,
    backend: str,
    pictures: Path | None,
    as_json: bool,
) -> None:
    """Score how well a bundle of the shipped checkpoint obeys held-out captions."""
    from sd_bench.quality import measure_quality
    from sd_runtime import Pipeline

    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)

    def on_answer(answer: Answer) -> None:
        if answer.faults:
            click.echo(
                f"{answer.seed:4} {answer.prompt}: {'; '.join(map(str, answer.faults))}", err=True
            )
        if pictures is not None:
            answer.image.save(pictures / f"{answer.seed:04}{'-wrong' * bool(answer.faults)}.png")

    with Pipeline.load(bundle, backend=backend) as pipeline:
        score = measure_quality(
            pipeline,
            captions=captions,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            on_answer=on_answer,
        )
    click.echo(json.dumps(_report(score)) if as_json else _sentences(score))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", help="The checkpoint. [default: the one that the bundle names]")
@click.option("--prompt", default=_PROMPT, show_default=True)
@click.option("--num-inference-steps", type=int, default=20, show_default=True)
@click.option("--scheduler", "schedulers", multiple=True, help="[default: every name]")
@click.option("--backend", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def parity(
    bundle: Path,
    model: str | None,
    prompt: str,
    num_inference_steps: int,
    schedulers: tuple[str, ...],
    backend: str,
    as_json: bool,
) -> None:
    """Compare a bundle's pictures with diffusers' own, scheduler by scheduler."""
    from dataclasses import asdict

    from sd_bench.parity import measure_parity
    from sd_runtime import Pipeline
    from sd_runtime.scheduler_config import SCHEDULERS, scheduler_name

    names = [scheduler_name(name) for name in schedulers] or list(SCHEDULERS)
    rows = []
    with Pipeline.load(bundle, backend=backend) as pipeline:
        for row in measure_parity(
            pipeline, prompt, model=model, schedulers=names, num_inference_steps=num_inference_steps
        ):
            rows.append(row)
            if not as_json:
                click.echo(
                    f"{row.scheduler:<36} latents {row.latents_error:.1e}  "
                    f"pixels within 1/255 {row.pixels_within_1:.3%}"
                )
    worst = {
        "schedulers": len(rows),
        "latents_error": max(row.latents_error for row in rows),
        "pixels_within_1": min(row.pixels_within_1 for row in rows),
    }
    if as_json:
        click.echo(json.dumps({"worst": worst, "rows": [asdict(row) for row in rows]}))
    else:
        click.echo(
            f"worst of {len(rows)}: latents {worst['latents_error']:.1e}, "
            f"pixels within 1/255 {worst['pixels_within_1']:.3%}"
        )


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
    by_shapes = ", ".join(f"{n}: {score.share_with(shapes=n):.1%}" for n in (1, 2, 3))
    counted = ", ".join(f"{kind} {n}" for kind, n in fault_kinds(score).most_common())
    return (
        f"{score.share:.1%} of {len(score.answers)} held-out captions fully right "
        f"(95 % interval {low:.1%} to {high:.1%})\n"
        f"by number of shapes  {by_shapes}\n"
        f"with a colour and shape never seen together  {score.share_with_unseen_pair():.1%}\n"
        f"faults  {counted or 'none'}\n"
        f"{score.seconds / len(score.answers):.2f} s a picture"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``sd-bench`` and return its exit code."""
    return run_command(cli, arguments)
