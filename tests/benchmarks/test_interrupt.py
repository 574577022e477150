"""Ctrl-C ends an instrument, wherever it comes, and all that it started."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from contextlib import closing
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from sd_bench.cli import main
from sd_bench.gate import gate_in_turns
from sd_bench.judgement import Criterion
from sd_bench.measurement import Settings
from sd_bench.served import ServerProcess, ask, body_of
from sd_runtime import Pipeline, Request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.mark.parametrize(
    "command",
    [
        ["latency", "--runs", "1", "--cold-starts", "0", "--output", "never.json"],
        ["scaling", "--runs", "1"],
        ["quality", "--captions", "1"],
        ["parity", "--scheduler", "ddim"],
        ["serve", "--rounds", "10", "--seconds", "1"],
    ],
    ids=lambda command: command[0],
)
def test_an_interrupt_that_a_library_swallows_ends_the_command(
    command: list[str],
    shapes_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = Pipeline.load

    def swallowing(*arguments: Any, **options: Any) -> Pipeline:
        with contextlib.suppress(KeyboardInterrupt):  # as OpenVINO does while it is imported
            signal.raise_signal(signal.SIGINT)
        return load(*arguments, **options)

    monkeypatch.setattr(Pipeline, "load", swallowing)
    monkeypatch.chdir(tmp_path)
    options = ["--backend", "onnxruntime", "--num-inference-steps", "1"]
    assert main([*command, str(shapes_bundle), *options]) == 130
    assert capsys.readouterr().out == ""


@contextlib.contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    """Ctrl-C after ``seconds``, which is to end the body."""

    def raise_interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raise_interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[Any]]:
    """Every process that the test starts."""
    processes: list[subprocess.Popen[Any]] = []
    start = subprocess.Popen.__init__

    def noting(self: subprocess.Popen[Any], *arguments: Any, **options: Any) -> None:
        processes.append(self)
        start(self, *arguments, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", noting)
    return processes


def test_a_server_that_is_starting_does_not_outlive_an_interrupt(
    shapes_bundle: Path, tmp_path: Path, started: list[subprocess.Popen[Any]]
) -> None:
    with interrupted(0.2):
        ServerProcess(shapes_bundle, log=tmp_path / "log", queue_size=1, options=[])
    assert [process.poll() for process in started] == [-signal.SIGKILL]


def test_a_server_does_not_draw_for_nobody(
    shapes_bundle: Path, tmp_path: Path, started: list[subprocess.Popen[Any]]
) -> None:
    options = ["--backend", "onnxruntime", "--threads", "1"]
    server = ServerProcess(shapes_bundle, log=tmp_path / "log", queue_size=1, options=options)
    request = Request("a red circle", seed=1, num_inference_steps=100)
    with closing(server.connection()) as connection, interrupted(0.2), server:
        ask(connection, body_of(request))
    assert [process.poll() for process in started] == [-signal.SIGKILL]


def test_a_gate_does_not_wait_for_a_side_that_warms_up(
    shapes_bundle: Path, tmp_path: Path, started: list[subprocess.Popen[Any]]
) -> None:
    settings = Settings(num_inference_steps=999, scheduler="ddim", backend="onnxruntime")
    with interrupted(0.2):
        gate_in_turns(
            shapes_bundle, shapes_bundle, Criterion(allowed_regression=0.1), settings=settings
        )
    assert [process.poll() for process in started] == [-signal.SIGKILL]
