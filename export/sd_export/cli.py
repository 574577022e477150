"""``sd-export``: a checkpoint in, a bundle out; ``build``: engines into one; ``schedule``: a table.

The bundle's path (or one JSON object) on stdout, progress and words for people on stderr.
Everything heavy is imported when it is needed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sd_engines.errors import ConfigError
from sd_runtime.command import raise_received_signal, run_command

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sd_engines.manifest import Manifest
    from sd_export.progress import Progress, StageEvent

_FILE = click.Path(path_type=Path)
_BACKENDS = "onnxruntime, openvino, tensorrt, tensorrt-rtx"
_CLEAR_LINE = "\r\x1b[K"


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    """Options of both commands."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="No progress and no words, only errors."),
        click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON."),
        click.option(
            "--calibration-prompts",
            type=_FILE,
            help="For int8: what to draw to find its ranges, one prompt a line.",
        ),
        click.option(
            "--precision",
            help="fp32, fp16, bf16, or int8 for openvino. [default: what suits the backends]",
        ),
        click.option(
            "--backend", "backends", multiple=True, metavar="NAME", help=f"{_BACKENDS}; repeatable."
        ),
    ):
        command = option(command)
    return command


@click.group(
    "sd-export",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("-m", "--model", help="Hub id, diffusers folder, or .safetensors or .ckpt file.")
@click.option("-o", "--output", type=_FILE, metavar="BUNDLE", help="Folder to make.")
@_shared
@click.option("--height", type=int, help="In pixels. [default: the checkpoint's own]")
@click.option("--width", type=int, help="In pixels. [default: the checkpoint's own]")
@click.option(
    "--size", "sizes", multiple=True, metavar="WIDTHxHEIGHT", help="One more to draw; repeatable."
)
@click.option(
    "--vae-tiling", is_flag=True, help="Decode what is larger than the VAE's own size by tiles."
)
@click.option("--batch-size", type=int, default=1, show_default=True, help="Pictures per call.")
@click.option("--revision", help="Branch, tag or commit on the Hub. [default: main]")
@click.option("--variant", help="Such as fp16: takes *.fp16.safetensors.")
@click.option(
    "--prediction-type",
    help="epsilon or v_prediction, where a single file does not say. [default: its family's]",
)
@click.option(
    "--num-inference-steps", type=int, help="What sd-run takes. [default: the pipeline's own]"
)
@click.option(
    "--guidance-scale", type=float, help="What sd-run takes. [default: the pipeline's own]"
)
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE[=SCALE]", help="Fused into it; repeatable."
)
@click.option(
    "--embedding",
    "embeddings",
    multiple=True,
    metavar="FILE[=TOKEN]",
    help="Textual inversion whose token prompts then know; repeatable.",
)
@click.option(
    "--max-prompt-chunks",
    type=int,
    default=1,
    show_default=True,
    help="Chunks of 75 tokens that a prompt may have; 2, 4 and 6 lose nothing.",
)
@click.option("--vae", metavar="MODEL", help="VAE to take instead: Hub id, folder or file.")
@click.option(
    "--preview-vae", metavar="MODEL", help="Tiny one for pictures on the way: Hub id or folder."
)
@click.option(
    "--controlnet",
    "controlnets",
    multiple=True,
    metavar="MODEL",
    help="Hub id or folder of a ControlNet, which takes a --control-image; repeatable.",
)
@click.option(
    "--feature-cache", is_flag=True, help="Also make the shallow UNet that --cache-interval runs."
)
@click.version_option(package_name="sd-toolkit", message="%(version)s")
@click.pass_context
def export_command(
    context: click.Context,
    *,
    model: str | None,
    output: Path | None,
    backends: tuple[str, ...],
    precision: Any,
    calibration_prompts: Path | None,
    height: int | None,
    width: int | None,
    sizes: tuple[str, ...],
    vae_tiling: bool,
    batch_size: int,
    revision: str | None,
    variant: str | None,
    prediction_type: str | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    loras: tuple[str, ...],
    embeddings: tuple[str, ...],
    max_prompt_chunks: int,
    vae: str | None,
    preview_vae: str | None,
    controlnets: tuple[str, ...],
    feature_cache: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Turn a Stable Diffusion checkpoint into a bundle that sd-run draws from.

    Example: sd-export --model CompVis/stable-diffusion-v1-4 --output bundle
    """
    subcommand = context.invoked_subcommand
    if subcommand is not None:
        if model is not None or output is not None:
            raise ConfigError(
                f"--model and --output belong to sd-export itself, not to {subcommand}",
                f"sd-export {subcommand} --help",
            )
        return
    if model is None or output is None:
        missing = "--model" if model is None else "--output"
        raise ConfigError(f"{missing} is missing", "sd-export --model MODEL --output BUNDLE")
    from sd_export import export

    report = export(
        model,
        output,
        backends=backends or ("onnxruntime",),
        precision=precision,
        calibration_prompts=_prompts(calibration_prompts),
        height=height,
        width=width,
        sizes=[_height_and_width(size) for size in sizes],
        vae_tiling=vae_tiling,
        batch_size=batch_size,
        revision=revision,
        variant=variant,
        prediction_type=prediction_type,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        loras=loras,
        embeddings=embeddings,
        max_prompt_chunks=max_prompt_chunks,
        vae=vae,
        preview_vae=preview_vae,
        controlnets=controlnets,
        feature_cache=feature_cache,
        progress=_progress(quiet),
    )
    if not quiet:
        _show_certificate(report.manifest)
        click.echo(f"Peak memory: {_size(report.peak_bytes)}.", err=True)
        click.echo(report.license, err=True)
    if as_json:
        made = {
            "bundle": str(report.path),
            "was_done": report.was_done,
            "peak_bytes": report.peak_bytes,
            "license": report.license,
            "stages": [asdict(event) for event in report.stages],
            **_described(report.manifest),
        }
        click.echo(json.dumps(made, indent=2))
    else:
        click.echo(output)


@export_command.command("build")
@click.argument("bundle", type=_FILE)
@_shared
@click.option("--target", help="cuda for onnxruntime; sm89, sm86+sm120 … for tensorrt-rtx.")
@click.option(
    "--workspace-mib",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="The most GPU memory that a layer of a TensorRT engine may work in.  [default: all]",
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
        calibration_prompts=_prompts(calibration_prompts),
        progress=_progress(quiet),
    )
    if not quiet:
        _show_certificate(manifest)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), **_described(manifest)}, indent=2))
    else:
        click.echo(bundle)


@export_command.command("schedule")
@click.argument("bundle", type=_FILE)
@click.option("-o", "--output", type=_FILE, metavar="FILE.json", help="[default: stdout]")
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
    from sd_engines.bundle import open_bundle
    from sd_runtime.files import check_writable, write_files
    from sd_runtime.schedule import schedule_of

    if output is not None:
        check_writable(output)
    schedule = schedule_of(open_bundle(bundle).manifest, **settings)
    text = json.dumps(schedule, allow_nan=False)
    if output is None:
        click.echo(text)
        return
    write_files({output: text.encode() + b"\n"})
    click.echo(output)


@export_command.command("triton")
@click.argument("bundle", type=_FILE)
@click.argument("repository", type=_FILE, metavar="MODEL_REPOSITORY")
@click.option("--backend", help="onnxruntime or tensorrt. [default: the first that BUNDLE has]")
def triton_command(*, bundle: Path, repository: Path, backend: str | None) -> None:
    """Write BUNDLE as a model repository of Triton Inference Server.

    Example: sd-export triton bundle models
    """
    from sd_export.triton import write_model_repository

    write_model_repository(bundle, repository, backend=backend)
    click.echo(repository)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``sd-export`` and return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    words = "Interrupted; the same command goes on where it stopped."
    return run_command(export_command, arguments, interrupted=words)


def _height_and_width(size: str) -> tuple[int, int]:
    """Of ``768x512``, the width first as everywhere in the field: 512 and 768."""
    width, times, height = size.lower().partition("x")
    if not (times and width.isdecimal() and height.isdecimal()):
        raise ConfigError(f"--size {size!r} is no size", "Write WIDTHxHEIGHT, such as 768x512.")
    return int(height), int(width)


def _prompts(path: Path | None) -> list[str] | None:
    """The lines of ``path``; `ConfigError` where it cannot be read or holds none."""
    from sd_runtime.prompts import prompts_from_text

    return None if path is None else prompts_from_text(path)


def _progress(quiet: bool) -> Progress:
    """Prints a line per stage that ended, and on a terminal the one that runs."""
    terminal = sys.stderr.isatty()

    def show(event: StageEvent) -> None:
        raise_received_signal()
        if quiet:
            return
        name = f"{event.component:<14} {event.stage:<20}"
        if event.state == "started":
            if terminal:
                click.echo(f"{_CLEAR_LINE}{name} …", err=True, nl=False)
            return
        start = _CLEAR_LINE if terminal else ""
        words = "skipped" if event.state == "skipped" else f"{event.seconds:6.1f} s"
        if event.stage == "wait":
            words = "another export to this bundle is running; waiting for it"
        size = _size(event.bytes) if event.bytes else ""
        click.echo(f"{start}{name} {words:>8}  {size:>9}  {event.detail}".rstrip(), err=True)

    return show


def _show_certificate(manifest: Manifest) -> None:
    for size in manifest.all_sizes:
        profile = f" of {size.profile.width}x{size.profile.height}" if manifest.sizes else ""
        click.echo(f"Certificate{profile}:", err=True)
        for entry in size.certificate:
            click.echo(
                f"  {entry.component:<14} {entry.backend:<12} {entry.precision:<5} "
                f"{entry.metric} {entry.figure:.3g} (tolerance {entry.tolerance:g}) "
                f"against {entry.reference}",
                err=True,
            )


def _described(manifest: Manifest) -> dict[str, Any]:
    return {
        "profile": asdict(manifest.profile),
        "engines": [asdict(engine) for engine in manifest.engines],
        "certificate": [asdict(entry) for entry in manifest.certificate],
        "sizes": [asdict(size) for size in manifest.sizes],
    }


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.2f} GB"
