"""``sd-bench peers``, the question whether anything else draws the same picture sooner."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=_PATH, required=False)
@click.option("--model", help="The checkpoint. [default: the one that the bundle names]")
@click.option("--peer", "names", multiple=True, help="Only this one; may be repeated.")
@click.option("--prompt", help="[default: one that the shipped checkpoint can draw]")
@click.option("--negative-prompt", default="")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--num-inference-steps", type=int, default=20, show_default=True)
@click.option("--guidance-scale", type=float, default=7.5, show_default=True)
@click.option(
    "--scheduler", default="euler", show_default=True, help="The default is one that all have."
)
@click.option("--backend", default="auto", show_default=True, help="Of the bundle.")
@click.option("--threads", type=click.IntRange(min=1), help="For all. [default: every core]")
@click.option("--cold-starts", type=click.IntRange(min=0), default=3, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=8, show_default=True, help="Warm pictures each."
)
@click.option(
    "--captions",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Have each draw so many captions of sd-bench quality, to score what its speed costs.",
)
@click.option("--cache", type=_PATH, help="Environments and conversions. [default: XDG's cache]")
@click.option("--pictures", type=_PATH, help="Keep pictures, latents and the peers' logs here.")
@click.option("-o", "--output", type=_PATH, metavar="FILE.json", help="Everything, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--setup", "environment", help="Make this peer's own environment, and end.")
def peers(
    *,
    bundle: Path | None,
    model: str | None,
    names: tuple[str, ...],
    prompt: str | None,
    negative_prompt: str,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    scheduler: str,
    backend: str,
    threads: int | None,
    cold_starts: int,
    rounds: int,
    captions: int,
    cache: Path | None,
    pictures: Path | None,
    output: Path | None,
    as_json: bool,
    environment: str | None,
) -> None:
    """Draw the same picture by a bundle and by other programs, side by side."""
    import logging
    from tempfile import TemporaryDirectory

    from sd_bench.measurement import PROMPT, Settings
    from sd_bench.peers.contest import Turns, measure_peers
    from sd_bench.peers.peer import default_cache, find_peers, set_up
    from sd_runtime.files import check_writable, write_files

    cache = (cache or default_cache()).expanduser().absolute()
    if environment is not None:
        click.echo(set_up(environment, cache))
        return
    if bundle is None:
        raise click.UsageError("Missing argument 'BUNDLE'.")
    if output is not None:
        check_writable(output)
    settings = Settings(
        prompt=PROMPT if prompt is None else prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        backend=backend,
        threads=threads,
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with TemporaryDirectory(prefix="sd-bench-peers-") as temporary:
        comparison = measure_peers(
            bundle.absolute(),
            settings,
            peers=find_peers(names),
            model=model,
            turns=Turns(cold_starts, rounds, captions),
            cache=cache,
            folder=(pictures or Path(temporary)).absolute(),
        )
    text = comparison.to_json()
    if output is not None:
        write_files({output: text.encode()})
    click.echo(text if as_json else comparison.table())
