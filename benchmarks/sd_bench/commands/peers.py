"""``sd-bench peers``, the question whether anything else draws the same picture sooner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sd_bench.commands.request import given, prompt_options, request_options
from sd_engines.border import check_package

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=_PATH, required=False)
@click.option("--model", help="The checkpoint. [default: the one that the bundle names]")
@click.option("--peer", "names", multiple=True, help="Only this one; may be repeated.")
@prompt_options
@request_options(
    without=("guidance_start", "guidance_stop", "cache_interval", "precision"), scheduler="euler"
)
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
@click.option(
    "--setup",
    "environment",
    metavar="NAME",
    help="Make the environment of this name that peers draw in, such as diffusers, and end.",
)
def peers(
    *,
    bundle: Path | None,
    model: str | None,
    names: tuple[str, ...],
    cold_starts: int,
    rounds: int,
    captions: int,
    cache: Path | None,
    pictures: Path | None,
    output: Path | None,
    as_json: bool,
    environment: str | None,
    **settings: Any,
) -> None:
    """Draw the same picture by a bundle and by other programs, side by side.

    Those that draw on the GPU where there is one, else those on the CPU. The default scheduler is
    one that all have; --threads bounds every one of them.
    """
    import logging
    from tempfile import TemporaryDirectory

    from sd_export.packages import check_packages

    check_package("scipy", extra="bench,export")
    check_packages(extra="bench,export")
    from sd_bench.environment import environment as fingerprint
    from sd_bench.measurement import Settings
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
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with TemporaryDirectory(prefix="sd-bench-peers-") as temporary:
        comparison = measure_peers(
            bundle.absolute(),
            Settings(**given(settings)),
            peers=find_peers(names, gpu="gpu" in fingerprint()),
            model=model,
            turns=Turns(cold_starts, rounds, captions),
            cache=cache,
            folder=(pictures or Path(temporary)).absolute(),
        )
    text = comparison.to_json()
    if output is not None:
        write_files({output: text.encode()})
    click.echo(text if as_json else comparison.table())
