"""ONNX Runtime alone: its targets, and what it does where its GPU provider is not there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from sd_engines import open_engine
from sd_engines.bundle import Bundle
from sd_engines.engine import build_engine
from sd_engines.errors import BackendError, ConfigError
from tiny_onnx import PROFILE

if TYPE_CHECKING:
    from sd_engines.manifest import EngineEntry

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
without_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this onnxruntime has the CUDA provider",
)


def _build(bundle: Bundle, **changed: str) -> EngineEntry:
    unet = bundle.manifest.components["unet"]
    return build_engine(
        "onnxruntime",
        bundle.path / unet.file,
        output_dir=bundle.path,
        component="unet",
        entry=unet,
        profile=PROFILE,
        **changed,  # type: ignore[arg-type]
    )


def test_entry(tiny_bundle: Bundle) -> None:
    entry = _build(tiny_bundle)
    assert (entry.version, entry.target) == (onnxruntime.__version__, "cpu")
    assert entry.file == "unet/model.onnx"


def test_precision_is_the_graphs(tiny_bundle: Bundle) -> None:
    assert _build(tiny_bundle, precision="fp32").precision == "fp32"
    with pytest.raises(ConfigError, match="in the precision of the graph, fp32, not bf16"):
        _build(tiny_bundle, precision="bf16")


def test_unknown_target(tiny_bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="unknown target 'cudo'") as caught:
        _build(tiny_bundle, target="cudo")
    assert "Did you mean 'cuda'" in caught.value.hint


@without_cuda
def test_no_cuda_provider(tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="no CUDAExecutionProvider") as caught:
        _build(tiny_bundle, target="cuda")
    assert 'pip install "sd-toolkit[cuda]"' in caught.value.hint
    cuda = replace(tiny_bundle.manifest.engines[0], target="cuda")
    manifest = replace(tiny_bundle.manifest, engines=(cuda,))
    with pytest.raises(BackendError, match="no CUDAExecutionProvider"):
        open_engine(Bundle(tiny_bundle.path, manifest), "unet")
