"""``python -m sd_runtime.embed``: the library for C and C++, built for this environment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sd_runtime.command import run_command

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.command(
    "python -m sd_runtime.embed", context_settings={"help_option_names": ["-h", "--help"]}
)
@click.argument("folder", type=click.Path(path_type=Path))
def embed_command(*, folder: Path) -> None:
    """Build libsd_runtime.so into FOLDER, with its headers and its CMake package.

    CC, CFLAGS and LDFLAGS are obeyed. Needs a C compiler, cffi and a Python with a shared library.
    """
    from sd_runtime.embed.library import build_library

    click.echo(build_library(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(embed_command, arguments)
