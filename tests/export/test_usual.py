"""``sd-export --model MODEL`` and no more: for which backends, and where to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sd_engines.bundle import open_bundle
from sd_engines.errors import BackendError
from sd_export import usual
from sd_export.cli import main

if TYPE_CHECKING:
    from sd_engines.spec import Precision


@pytest.mark.parametrize(
    ("capability", "installed", "precision", "backends"),
    [
        (None, {"openvino", "onnxruntime", "tensorrt"}, None, ("openvino", "onnxruntime")),
        (None, {"onnxruntime"}, "fp16", ("onnxruntime",)),
        (None, {"openvino", "onnxruntime"}, "bf16", ("openvino",)),
        (None, {"onnxruntime"}, "bf16", ("onnxruntime",)),  # whose error says what to do
        (None, set(), None, ("onnxruntime",)),
        (89, {"openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"}, None, ("tensorrt",)),
        (89, {"onnxruntime", "tensorrt-rtx"}, "fp16", ("tensorrt-rtx",)),
    ],
)
def test_backends_are_those_that_suit_the_machine(
    monkeypatch: pytest.MonkeyPatch,
    capability: int | None,
    installed: set[str],
    precision: Precision | None,
    backends: tuple[str, ...],
) -> None:
    _make_machine(monkeypatch, capability, installed)
    assert usual.usual_backends(precision) == backends


def test_a_gpu_without_its_packages_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _make_machine(monkeypatch, 90, {"onnxruntime"})
    assert usual.usual_backends(None) == ("onnxruntime",)
    assert 'pip install "sd-toolkit[tensorrt]"' in caplog.text


@pytest.mark.parametrize(
    ("model", "output"),
    [
        ("CompVis/stable-diffusion-v1-4", "stable-diffusion-v1-4.bundle"),
        ("models/mine.v2/", "mine.v2.bundle"),
        ("../models/mine.v2.safetensors", "mine.v2.bundle"),
        ("mine.ckpt", "mine.bundle"),
        (".", "here.bundle"),
    ],
)
def test_the_bundle_is_called_after_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, output: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert usual.usual_output(model) == Path(output)


def test_a_model_alone_makes_a_bundle_beside_us(
    smallest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _make_machine(monkeypatch, None, {"onnxruntime", "openvino"})
    monkeypatch.chdir(tmp_path)
    assert main(["--model", str(smallest), "--json", "--quiet"]) == 0
    made = json.loads(capsys.readouterr().out)
    bundle = tmp_path / f"{smallest.name}.bundle"
    assert Path(made["bundle"]) == bundle
    backends = {engine.backend for engine in open_bundle(bundle).manifest.engines}
    assert backends == {"onnxruntime", "openvino"}


def _make_machine(
    monkeypatch: pytest.MonkeyPatch, capability: int | None, installed: set[str]
) -> None:
    def compute_capability() -> int:
        if capability is None:
            raise BackendError("there is no NVIDIA driver on this machine", "Name another.")
        return capability

    monkeypatch.setattr(usual, "compute_capability", compute_capability)
    monkeypatch.setattr(usual, "_is_here", installed.__contains__)
