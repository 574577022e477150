"""Signals stop a command, even where a library swallows what they raise."""

from __future__ import annotations

import contextlib
import signal
import sys

import click
import pytest

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
    assert run_command(work, []) == 0
