"""A machine that serves has none of torch, onnx, scipy and matplotlib: what needs one says so."""

from __future__ import annotations

import sys

import pytest

from sd_bench.cli import main


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["latency", "BUNDLE", "--output", "a.json"], "onnx", "bench"),
        (["scaling", "BUNDLE", "--plot", "a.svg"], "matplotlib", "bench"),
        (["gate", ".", "BUNDLE", "--html", "a.html"], "matplotlib", "bench"),
        (["quality", "BUNDLE"], "scipy", "bench"),
        (["parity", "BUNDLE"], "torch", "export"),
        (["parity", "BUNDLE"], "diffusers", "export"),
        (["peers", "BUNDLE"], "scipy", "bench,export"),
        (["peers", "BUNDLE"], "torch", "bench,export"),
        (["peers", "BUNDLE"], "safetensors", "bench,export"),
    ],
)
def test_a_package_that_is_not_there_is_said_before_a_bundle_is_opened(
    command: list[str],
    package: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(command) == 4
    said = capsys.readouterr().err
    assert f"the package {package} is not installed" in said
    assert f'pip install "sd-toolkit[{extra}]"' in said
