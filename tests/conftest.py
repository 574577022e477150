"""What all tests share: real bundles around tiny graphs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sd_engines import Bundle

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for tests that import onnxruntime themselves
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors more only wait for each other


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own, so that what `auto` remembers of this machine is not theirs."""
    before = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        for name, folder in (("HF_HOME", "huggingface"), ("MPLCONFIGDIR", "matplotlib")):
            patch.setenv(name, os.environ.get(name) or str(before / folder))
        yield


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


@pytest.fixture(scope="session")
def cached_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with a shallow UNet, for ONNX Runtime and OpenVINO; two pictures."""
    from sd_export.cli import main
    from tiny import make_checkpoint

    folder = tmp_path_factory.mktemp("cached")
    checkpoint = make_checkpoint(folder / "checkpoint", block_out_channels=(32,))
    arguments = ["--backend", "onnxruntime", "--backend", "openvino", "--batch-size", "2"]
    bundle = folder / "bundle"
    arguments += ["--model", str(checkpoint), "--output", str(bundle), "--feature-cache", "--quiet"]
    assert main(arguments) == 0
    return bundle


@pytest.fixture(scope="session")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that is fastest to export."""
    from tiny import make_smallest_checkpoint

    return make_smallest_checkpoint(tmp_path_factory.mktemp("checkpoint") / "smallest")


@pytest.fixture(scope="session")
def sizes_bundle(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``smallest``, for 8×8, 16×24 and 24×8 pictures (height × width)."""
    from sd_export.cli import main

    path = tmp_path_factory.mktemp("sizes") / "bundle"
    arguments = ["--size", "24x16", "--size", "8x24", "--size", "8x8"]  # its own once more
    arguments += ["--backend", "onnxruntime"]
    assert main(["--model", str(smallest), "--output", str(path), *arguments, "--quiet"]) == 0
    return path
