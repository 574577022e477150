"""What all tests share: real bundles around tiny graphs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines import Bundle

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for tests that import onnxruntime themselves


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Bundle:
    """A bundle of one UNet-like graph, sealed at ``tmp_path / "bundle"``."""
    from tiny_onnx import make_bundle

    return make_bundle(tmp_path / "bundle")
