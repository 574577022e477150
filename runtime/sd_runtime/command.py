"""What every command of the toolkit shares: how it shows progress, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sd_engines.errors import BackendError, SdError

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED, TERMINATED = 130, 143
_received: list[int] = []
"""Signals that asked this process to stop."""
_ending = threading.Event()
"""Set once it stops: another signal must not interrupt the last words."""


def run_command(
    command: click.Command,
    arguments: Sequence[str] | None,
    *,
    interrupted: str = "Interrupted.",
) -> int:
    """Run ``command`` and return its exit code: 0, an `SdError`'s 1 … 5, 130 or 143.

    Any other exception is a bug and keeps its traceback. ``interrupted`` is said after Ctrl-C.
    """
    _ending.clear()
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _exit_code(command, arguments, interrupted)
    except KeyboardInterrupt:  # while the end of it was told
        return INTERRUPTED
    finally:
        _ending.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def _exit_code(command: click.Command, arguments: Sequence[str] | None, interrupted: str) -> int:
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
    except OSError as error:  # a name too long, a folder that is gone, stdout on a full disk
        with suppress(OSError):
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"Error: {where}{error.strerror or error}\nCheck paths and disks.", err=True)
        _drop_unwritten()
        return SdError.exit_code
    except (click.Abort, KeyboardInterrupt):
        _ending.set()
        click.echo(interrupted, err=True)
        return INTERRUPTED


def _drop_unwritten() -> None:
    """Forget what stdout could not take: Python would try again at its end, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def fresh_line() -> str:
    """What wipes a bar off a terminal's line before words take its place; elsewhere nothing."""
    return "\r\x1b[K" if sys.stderr.isatty() else ""


def progress_bar(length: int, label: str) -> Any:
    """A context manager that gives a bar of ``length`` steps on a terminal, None elsewhere."""
    if not sys.stderr.isatty():
        return nullcontext()
    return click.progressbar(length=length, label=label, file=sys.stderr, show_pos=True, width=30)


def raise_received_signal() -> None:
    """Stop again where a library swallowed the first try: in a destructor, say, all is ignored.

    For long work to call between its stages; does nothing where no signal came.
    """
    if _received:
        _raise(_received[0])


def _stop(number: int, _frame: object) -> None:
    _received.append(number)
    if not _ending.is_set():
        _raise(number)


def _raise(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(TERMINATED)
