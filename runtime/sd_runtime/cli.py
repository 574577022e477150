"""``sd-run``: a bundle and a prompt in, picture files out.

Paths (or one JSON object) on stdout, words for people on stderr. Everything heavy is imported
when it is needed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sd_engines.errors import ConfigError
from sd_runtime.command import fresh_line, run_command

if TYPE_CHECKING:
    from collections.abc import Sequence

_FILE = click.Path(path_type=Path)


@click.command("sd-run", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=_FILE)
@click.argument("prompt", nargs=-1)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    help="Picture to write: .png, .jpg or .webp. May hold {index} and {seed}; several pictures "
    "are numbered otherwise. With --jobs, a folder.",
)
@click.option("--prompts-file", type=_FILE, help="One prompt a line, or .jsonl with options.")
@click.option(
    "--jobs", type=_FILE, help="Such a file again, drawn into a folder under names that last."
)
@click.option("--resume", is_flag=True, help="Leave the pictures of --jobs that are there.")
@click.option("--ray", is_flag=True, help="Let the workers of a Ray cluster draw --jobs.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Of --ray. [default: one a GPU, else one a machine]",
)
@click.option("--from-image", type=_FILE, help="Draw a picture again from the recipe inside it.")
@click.option(
    "--image",
    type=_FILE,
    help="Start from this picture, resized to the bundle's size; or draw variations of it. An "
    "upscaler makes it larger.",
)
@click.option("--mask", type=_FILE, help="Repaint only what is white in this one.")
@click.option(
    "--strength",
    type=float,
    help="How far to leave --image, 0 … 1: the share of the steps that run. [default: the "
    "bundle's, mostly 0.8; 1 with --mask]",
)
@click.option(
    "--depth-map",
    type=_FILE,
    help="How near each part of --image is, where the bundle would estimate it, or makes both "
    "larger: a grey picture or .npy, brighter or greater is nearer.",
)
@click.option(
    "--noise-level",
    type=int,
    help="Of an upscaler: noise on --image before it is made larger. [default: 20]",
)
@click.option(
    "--refiner",
    type=_FILE,
    metavar="BUNDLE",
    help="Let the refiner of Stable Diffusion XL in this bundle draw the last steps.",
)
@click.option(
    "--high-noise-frac",
    type=float,
    help="Share of the steps before --refiner goes on. [default: 0.8]",
)
@click.option(
    "--control-image",
    type=_FILE,
    multiple=True,
    help="What the bundle's ControlNet sees; one each.",
)
@click.option(
    "--controlnet-conditioning-scale",
    type=float,
    multiple=True,
    help="How much it counts; one for all, or one each. [default: 1]",
)
@click.option(
    "--control-guidance-start",
    type=float,
    multiple=True,
    help="Share of the steps it counts after. [default: 0]",
)
@click.option(
    "--control-guidance-end",
    type=float,
    multiple=True,
    help="Share of the steps it counts until; later ones do not run it. [default: 1]",
)
@click.option(
    "--guess-mode", is_flag=True, default=None, help="Let it lead where the prompt says nothing."
)
@click.option("--negative-prompt", help="What the picture should not show.")
@click.option(
    "--prompt-weighting",
    is_flag=True,
    default=None,
    help="Read brackets in prompts as weights: (more), [less], (word:1.3).",
)
@click.option("--seed", type=int, help="0 … 2⁶⁴−1; picture i takes seed + i. [default: random]")
@click.option("--num-images", type=int, help="Pictures per prompt. [default: 1]")
@click.option("--num-inference-steps", type=int, help="[default: the bundle's, mostly 50]")
@click.option(
    "--guidance-scale", type=float, help="≤ 1 is none. [default: the bundle's, mostly 7.5]"
)
@click.option(
    "--guidance-start", type=float, help="Share of the steps it begins after. [default: 0]"
)
@click.option(
    "--guidance-stop",
    type=float,
    help="Share of the steps it ends after; the others take half the work. [default: 1]",
)
@click.option(
    "--safety-guidance",
    metavar="weak|medium|strong|max",
    help="Lead pictures from text away from what is not safe: 3 UNet rows a step. [default: off]",
)
@click.option(
    "--safety-concept", metavar="TEXT", help="What that leads away from. [default: the paper's]"
)
@click.option(
    "--cache-interval",
    type=int,
    help="Run the whole UNet every N steps only: sooner, not the same picture. [default: 1]",
)
@click.option(
    "--scheduler",
    help="Such as ddim, euler_a, dpm++_2m_karras, unipc. [default: the checkpoint's own]",
)
@click.option("--eta", type=float, help="Noise of ddim and tcd, 0 … 1. [default: 0]")
@click.option("--height", type=int, help="In pixels: one of the bundle's sizes. [default: its own]")
@click.option("--width", type=int, help="The same.")
@click.option("--grid", is_flag=True, help="One file with all pictures side by side.")
@click.option("--save-latents", type=_FILE, metavar="FILE.npy", help="Also write the latents.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[=SCALE]",
    help="Put on the engines when they are opened, not on a refiner's; repeatable.",
)
@click.option("--backend", help="One of the bundle's. [default: the fastest that runs here]")
@click.option("--precision", help="The UNet's, of a bundle with several. [default: not fp8, int8]")
@click.option("--threads", type=click.IntRange(min=1), help="For backends on the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print files, seeds and timings as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no words, only errors.")
@click.version_option(package_name="sd-toolkit", message="%(version)s")
def run(
    *,
    bundle: Path,
    prompt: tuple[str, ...],
    output: str,
    prompts_file: Path | None,
    jobs: Path | None,
    resume: bool,
    ray: bool,
    workers: int | None,
    from_image: Path | None,
    refiner: Path | None,
    num_images: int | None,
    grid: bool,
    save_latents: Path | None,
    loras: tuple[str, ...],
    backend: str | None,
    precision: Any,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Draw PROMPT with the engines in BUNDLE, which sd-export made.

    Example: sd-run bundle "a red circle" --output circle.png --seed 7
    """
    import logging

    from sd_runtime.lora import find_loras

    level = logging.ERROR if quiet else logging.WARNING
    form = f"{fresh_line()}%(levelname)s: %(message)s"
    logging.basicConfig(level=level, format=form, stream=sys.stderr)
    # A first run measures for some seconds: say so.
    logging.getLogger("sd_engines.choice").setLevel(level if quiet else logging.INFO)
    options["num_images_per_prompt"] = num_images
    options = {name: value for name, value in options.items() if value not in (None, ())}
    if workers is not None and not ray:
        raise ConfigError("--workers without --ray", "Leave it out, or add --ray --jobs FILE.")
    if jobs is not None:
        from sd_runtime.folder_job import FolderJob, draw_folder

        others = (prompt, prompts_file, from_image, grid, save_latents, refiner)
        if any(others):
            raise ConfigError(
                "--jobs stands alone: all its pictures come from its file, and each is one file",
                "Leave out the prompt, --prompts-file, --from-image, --grid, --save-latents and "
                "--refiner.",
            )
        folder_job = FolderJob(
            bundle=bundle,
            jobs_file=jobs,
            options=options,
            folder=Path(output),
            resume=resume,
            ray=ray,
            workers=workers,
            backend=backend,
            precision=precision,
            threads=threads,
            loras=find_loras(loras),
        )
        draw_folder(folder_job, as_json=as_json, quiet=quiet)
        return
    if resume or ray:
        name = "--resume" if resume else "--ray"
        raise ConfigError(f"{name} without --jobs", "Put the prompts into a file: --jobs FILE.")
    from sd_runtime.job import draw
    from sd_runtime.order import Job

    job = Job(
        bundle=bundle,
        prompts=prompt,
        prompts_file=prompts_file,
        from_image=from_image,
        refiner=refiner,
        options=options,
        output=output,
        grid=grid,
        save_latents=save_latents,
        backend=backend,
        precision=precision,
        threads=threads,
        loras=find_loras(loras),
    )
    draw(job, as_json=as_json, quiet=quiet)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``sd-run`` and return its exit code."""
    return run_command(run, arguments)
