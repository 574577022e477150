"""Signals stop a command, even where a library swallows what they raise."""

from __future__ import annotations

import contextlib
import signal
import sys

import click
import pytest

from sd_engines.errors import SdError
from sd_runtime.command import raise_received_signal, run_command


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_swallowed_signal_stops_the_command_at_its_next_stage(
    number: signal.Signals, code: int
) -> None:
    reached = []

    @click.command("work")
    def work() -> None:
        raise_received_signal()
        with contextlib.suppress(BaseException):
            signal.raise_signal(number)
        reached.append("after the signal")
        raise_received_signal()
        reached.append("the next stage")

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        sys.exit(run_command(work, []))
    assert caught.value.code == code
    assert reached == ["after the signal"]
    assert signal.getsignal(number) == before


def test_an_earlier_signal_does_not_stop_the_next_command() -> None:
    @click.command("stopped")
    def stopped() -> None:
        signal.raise_signal(signal.SIGINT)

    @click.command("work")
    def work() -> None:
        raise_received_signal()

    assert run_command(stopped, []) == 130
    raise_received_signal()  # nor what the same process does beside commands
    assert run_command(work, []) == 0


@pytest.mark.parametrize("fails", [False, True])
def test_more_signals_do_not_interrupt_the_last_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, fails: bool
) -> None:
    echo = click.echo

    def interrupted_echo(*arguments: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)
        echo(*arguments, **options)

    @click.command("work")
    def work() -> None:
        if fails:
            raise SdError("it fails", "Mend it.")
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("sd_runtime.command.click.echo", interrupted_echo)
    assert run_command(work, []) == 130
    assert signal.getsignal(signal.SIGINT) == before
    assert ("Interrupted." in capsys.readouterr().err) != fails
