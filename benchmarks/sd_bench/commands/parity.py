"""``sd-bench parity``, the question whether it is the picture that diffusers draws."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from sd_bench.commands.request import request_options
from sd_bench.measurement import PROMPT


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", help="The checkpoint. [default: the one that the bundle names]")
@click.option("--prompt", default=PROMPT, show_default=True)
@request_options(
    without=(
        "guidance_start",
        "guidance_stop",
        "cache_interval",
        "scheduler",
        "precision",
        "threads",
    )
)
@click.option("--scheduler", "schedulers", multiple=True, help="[default: every name]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def parity(
    bundle: Path,
    model: str | None,
    prompt: str,
    num_inference_steps: int,
    guidance_scale: float,
    height: int | None,
    width: int | None,
    schedulers: tuple[str, ...],
    backend: str,
    as_json: bool,
) -> None:
    """Compare a bundle's pictures with diffusers' own, scheduler by scheduler."""
    from sd_export.packages import check_packages

    check_packages()
    from sd_bench.measurable import measurable_bundle
    from sd_bench.parity import measure_parity
    from sd_runtime import Pipeline
    from sd_runtime.scheduler_config import SCHEDULERS, scheduler_name

    names = [scheduler_name(name) for name in schedulers] or list(SCHEDULERS)
    rows = []
    with Pipeline.load(measurable_bundle(bundle), backend=backend) as pipeline:
        for row in measure_parity(
            pipeline,
            prompt,
            model=model,
            schedulers=names,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
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
