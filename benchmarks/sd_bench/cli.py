"""``sd-bench``: the command line of the instruments."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

import click

from sd_runtime.command import run_command

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMANDS: Final = ("latency", "scaling", "compare", "gate", "peers", "parity", "quality", "serve")


class _Commands(click.Group):
    """Each command is the function of its name in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"sd_bench.commands.{cmd_name}"), cmd_name)
        return command


@click.group("sd-bench", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sd-toolkit", message="%(version)s")
def cli() -> None:
    """Measure a bundle."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``sd-bench`` and return its exit code."""
    return run_command(cli, arguments)
