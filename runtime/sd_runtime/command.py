"""How every command of the toolkit ends: errors caught once, and their exit codes."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NoReturn

import click

from sd_engines.errors import BackendError, SdError

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED, TERMINATED = 130, 143


def run_command(
    command: click.Command,
    arguments: Sequence[str] | None = None,
    *,
    interrupted: str = "Interrupted.",
) -> int:
    """Run ``command`` and return its exit code: 0, an `SdError`'s 1 … 5, 130 or 143.

    Any other exception is a bug and keeps its traceback. ``interrupted`` is said after Ctrl-C.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return command.main(arguments, prog_name=command.name, standalone_mode=False) or 0
    except SdError as error:
        click.echo(f"Error: {error.message}\n{error.hint}", err=True)
        return error.exit_code
    except MemoryError:
        click.echo("Error: out of memory\nClose other programs, or use a larger machine.", err=True)
        return BackendError.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(interrupted, err=True)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_signal: int, _frame: object) -> NoReturn:
    raise SystemExit(TERMINATED)
