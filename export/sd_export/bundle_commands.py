"""The commands of ``sd-export`` on a bundle that is there: ``build``, ``schedule``, ``triton``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from sd_export.options import FILE, engine_options, prompts_of
from sd_export.terminal import described, show_certificate, shown_progress

if TYPE_CHECKING:
    from pathlib import Path


@click.command("build")
@click.argument("bundle", type=FILE)
@engine_options
@click.option(
    "--target",
    help="cuda for onnxruntime; sm89, sm86+sm120 … for tensorrt-rtx; for tensorrt all GPUs of this "
    "one's compute capability (sm89 …), or from Ampere on (sm80+).",
)
@click.option(
    "--workspace-mib",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="The most GPU memory that a layer of a TensorRT engine may work in. [default: all]",
)
def build_command(
    *,
    bundle: Path,
    backends: tuple[str, ...],
    precision: Any,
    calibration_prompts: Path | None,
    target: str | None,
    workspace_mib: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Add engines to BUNDLE from the ONNX inside it; the checkpoint is not needed.

    Example: sd-export build bundle --backend tensorrt
    """
    from sd_export import build

    manifest = build(
        bundle,
        backends=backends,
        precision=precision,
        target=target,
        workspace_bytes=workspace_mib and workspace_mib << 20,
        calibration_prompts=prompts_of(calibration_prompts),
        progress=shown_progress(quiet),
    )
    if not quiet:
        show_certificate(manifest)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), **described(manifest)}, indent=2))
    else:
        click.echo(bundle)


@click.command("schedule")
@click.argument("bundle", type=FILE)
@click.option("-o", "--output", type=FILE, metavar="FILE.json", help="[default: stdout]")
@click.option("--scheduler", help="As sd-run takes it. [default: the checkpoint's own]")
@click.option("--num-inference-steps", type=int, help="[default: the bundle's]")
@click.option("--guidance-scale", type=float, help="[default: the bundle's]")
@click.option("--guidance-start", type=float, default=0.0, show_default=True)
@click.option("--guidance-stop", type=float, default=1.0, show_default=True)
@click.option("--eta", type=float, default=0.0, show_default=True)
@click.option("--strength", type=float, help="Makes it one of image-to-image.")
def schedule_command(*, bundle: Path, output: Path | None, **settings: Any) -> None:
    """Print the table that a sampler is on BUNDLE as JSON, for services that run it themselves.

    Example: sd-export schedule bundle --scheduler dpm++_2m_karras --num-inference-steps 20
    """
    from sd_runtime.files import check_writable, write_files
    from sd_runtime.schedule import schedule_of
    from sd_runtime.scheduler_check import drawable_bundle

    if output is not None:
        check_writable(output)
    schedule = schedule_of(drawable_bundle(bundle).manifest, **settings)
    text = json.dumps(schedule, allow_nan=False)
    if output is None:
        click.echo(text)
        return
    write_files({output: text.encode() + b"\n"})
    click.echo(output)


@click.command("triton")
@click.argument("bundle", type=FILE)
@click.argument("repository", type=FILE, metavar="MODEL_REPOSITORY")
@click.option("--backend", help="onnxruntime or tensorrt. [default: the first that BUNDLE has]")
def triton_command(*, bundle: Path, repository: Path, backend: str | None) -> None:
    """Write BUNDLE as a model repository of Triton Inference Server.

    Example: sd-export triton bundle models
    """
    from sd_export.triton import write_model_repository

    write_model_repository(bundle, repository, backend=backend)
    click.echo(repository)
