"""``sd-serve``: bundles behind HTTP.

Its address on stdout once it listens, words for people on stderr. Everything heavy is imported
when it is needed, so that ``--help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sd_engines.errors import BackendError
from sd_runtime.command import run_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_runtime.serve.log_format import LogFormat

_POSITIVE = click.IntRange(min=1)


@click.command("sd-serve", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument(
    "bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path)
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--queue-size",
    type=_POSITIVE,
    default=16,
    show_default=True,
    help="Requests that may wait; one more is refused at once.",
)
@click.option(
    "--max-images", type=_POSITIVE, default=10, show_default=True, help="Pictures in one request."
)
@click.option(
    "--max-steps", type=_POSITIVE, default=150, show_default=True, help="Steps of one request."
)
@click.option(
    "--backend",
    default="auto",
    help="One of the bundles'. [default: the fastest that runs here]",
)
@click.option("--precision", help="The UNet's, of a bundle with several. [default: not fp8, int8]")
@click.option("--threads", type=_POSITIVE, help="For backends on the CPU.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[=SCALE]",
    help="Put on the engines of all; repeatable.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="Let in only who sends the key in this file. [default: $SD_SERVE_API_KEY, else everybody]",
)
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.version_option(package_name="sd-toolkit", message="%(version)s")
def serve_command(
    *,
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    queue_size: int,
    max_images: int,
    max_steps: int,
    backend: str,
    precision: Any,
    threads: int | None,
    loras: tuple[str, ...],
    api_key_file: Path | None,
    log_format: LogFormat,
) -> int:
    """Answer HTTP requests with the engines in BUNDLE, which sd-export made.

    Of several bundles, all are open at once; a request chooses one by its model, the folder's name.

    Example: sd-serve sd14.bundle --port 8000

    SIGTERM and Ctrl-C end it in order: what was accepted is drawn first.
    """
    from sd_runtime.serve.api_key import load_api_key

    api_key = load_api_key(api_key_file)
    try:
        from sd_runtime.serve.log_format import start_logging
        from sd_runtime.serve.server import Settings, serve
    except ModuleNotFoundError as error:
        raise BackendError(
            f"sd-serve needs {error.name}, which is not installed",
            'pip install "sd-toolkit[serve]"',
        ) from error

    start_logging(log_format)
    settings = Settings(
        host=host,
        port=port,
        queue_size=queue_size,
        max_images=max_images,
        max_steps=max_steps,
        backend=backend,
        precision=precision,
        threads=threads,
        loras=loras,
        api_key=api_key,
    )
    return serve(bundles, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``sd-serve`` and return its exit code."""
    return run_command(serve_command, arguments)
