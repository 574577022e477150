"""``sd-export``: a checkpoint in, a bundle out; ``build``: engines into one; ``schedule``: a table.

The bundle's path (or one JSON object) on stdout, progress and words for people on stderr.
Everything heavy is imported when it is needed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from shlex import quote
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sd_engines.errors import ConfigError
from sd_export.bundle_commands import build_command, schedule_command, triton_command
from sd_export.options import FILE, engine_options, prompts_of
from sd_export.packages import check_packages
from sd_export.terminal import described, show_certificate, shown_progress, size_words
from sd_runtime.command import run_command

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class _Commands(click.Group):
    """Knows a checkpoint where a command should be: --model was forgotten."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and os.path.basename(args[0]) != args[0]:  # noqa: PTH119
            raise ConfigError(
                f"{args[0]!r} is no command",
                f"A checkpoint is named by --model: sd-export --model {quote(args[0])}",
            )
        return super().resolve_command(ctx, args)


@click.group(
    "sd-export",
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("-m", "--model", help="Hub id, diffusers folder, or .safetensors or .ckpt file.")
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="BUNDLE",
    help="Folder to make. [default: the model's name, with .bundle]",
)
@engine_options
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

    Example: sd-export --model CompVis/stable-diffusion-v1-4
    """
    subcommand = context.invoked_subcommand
    if subcommand is not None:
        if given := _given(context):
            raise ConfigError(
                f"before {subcommand} stands what belongs to sd-export itself: {', '.join(given)}",
                f"Write options of {subcommand} after it: sd-export {subcommand} --help",
            )
        return
    if not model:  # an unset variable is none
        raise ConfigError("--model is missing", "sd-export --model MODEL")
    check_packages()
    from sd_export import export
    from sd_export.usual import usual_backends, usual_output

    output = output or usual_output(model)
    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    report = export(
        model,
        output,
        backends=backends or usual_backends(precision),
        precision=precision,
        calibration_prompts=prompts_of(calibration_prompts),
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
        progress=shown_progress(quiet),
    )
    if not quiet:
        show_certificate(report.manifest)
        click.echo(f"Peak memory: {size_words(report.peak_bytes)}.", err=True)
        click.echo(report.license, err=True)
    if as_json:
        made = {
            "bundle": str(report.path),
            "was_done": report.was_done,
            "peak_bytes": report.peak_bytes,
            "license": report.license,
            "stages": [asdict(event) for event in report.stages],
            **described(report.manifest),
        }
        click.echo(json.dumps(made, indent=2))
    else:
        click.echo(output)


for _command in (build_command, schedule_command, triton_command):
    export_command.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``sd-export`` and return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    words = "Interrupted; the same command goes on where it stopped."
    return run_command(export_command, arguments, interrupted=words)


def _given(context: click.Context) -> list[str]:
    """The options of ``context`` that are on the command line."""
    return [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name is not None
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]


def _height_and_width(size: str) -> tuple[int, int]:
    """Of ``768x512``, the width first as everywhere in the field: 512 and 768."""
    width, times, height = size.lower().partition("x")
    if not (times and width.isdecimal() and height.isdecimal()):
        raise ConfigError(f"--size {size!r} is no size", "Write WIDTHxHEIGHT, such as 768x512.")
    return int(height), int(width)
