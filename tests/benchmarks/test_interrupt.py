"""Ctrl-C ends an instrument, wherever it comes, and all that it started."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Any

import pytest

from sd_bench.cli import main
from sd_runtime import Pipeline

if TYPE_CHECKING:
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
