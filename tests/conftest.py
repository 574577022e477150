"""What all tests share: real bundles around tiny graphs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sd_engines import Bundle

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for tests that import onnxruntime themselves


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Bundle:
    """A bundle of one UNet-like graph, sealed at ``tmp_path / "bundle"``."""
    from tiny_onnx import make_bundle

    return make_bundle(tmp_path / "bundle")


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, exported for ONNX Runtime and OpenVINO."""
    from sd_export import export

    checkpoint = Path(__file__).parent.parent / "benchmarks" / "shapes" / "checkpoint"
    bundle = tmp_path_factory.mktemp("shapes") / "bundle"
    export(checkpoint, bundle, backends=("onnxruntime", "openvino"))
    return bundle
