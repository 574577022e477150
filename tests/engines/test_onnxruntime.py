"""ONNX Runtime alone: its targets, and what it does where its GPU provider is not there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sd_engines import open_engine
from sd_engines.backends import onnxruntime as backend
from sd_engines.backends import onnxruntime_package
from sd_engines.backends.onnxruntime import LEAN
from sd_engines.bundle import Bundle, ComponentEntry, hash_files, portable_entry
from sd_engines.engine import build_engine, load_engine
from sd_engines.errors import BackendError, ConfigError
from sd_engines.spec import TensorSpec
from tiny_onnx import PROFILE, has_gpu

if TYPE_CHECKING:
    from sd_engines.entries import EngineEntry
    from sd_engines.spec import Precision

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


THREADS = """
import os, sys, time
from sd_engines.bundle import open_bundle
from sd_engines.engine import listed_engines, load_engine

def count():
    time.sleep(0.05)  # a thread that was joined is listed for a moment more
    return len(os.listdir("/proc/self/task"))

bundle = open_bundle(sys.argv[1])
(engine,) = listed_engines(bundle, "unet", backend="onnxruntime")
entry = bundle.manifest.components["unet"]
for threads in (1, 1, 2, 4):  # the first starts what stays
    idle = count()
    with load_engine(
        bundle.path / engine.file, component=entry, engine=engine, max_batch=2, threads=threads
    ):
        print(count() - idle)
"""


def test_it_computes_in_as_many_threads_as_are_asked_for(tiny_bundle: Bundle) -> None:
    """The caller's among them; counted in a process of its own, where no other begins or ends."""
    words = [sys.executable, "-c", THREADS, tiny_bundle.path]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert found.stdout.split()[1:] == ["0", "1", "3"]


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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_lean_engine_keeps_no_weights_in_memory(tmp_path: Path) -> None:
    """64 MiB of fp16 weights, which ONNX Runtime else widens on a CPU and keeps."""
    rows, width = 8, 5792
    held, results = {}, {}
    component = _product(tmp_path, width)
    entry = portable_entry(
        "unet", component, PROFILE, "onnxruntime", version="1", target="cpu", precision=None
    )
    x = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    for flags in (LEAN, {}):
        engine = replace(entry, flags=flags)
        path = tmp_path / component.file
        before = _anonymous_bytes()
        with load_engine(path, component=component, engine=engine, max_batch=rows) as opened:
            results[len(flags)] = opened(x=x)["y"]
            held[len(flags)] = _anonymous_bytes() - before
    assert held[0] > 128e6 > 32e6 > held[len(LEAN)]
    assert np.abs(results[0] - results[len(LEAN)]).max() < 1e-6 * np.abs(results[0]).max()


def _product(folder: Path, width: int) -> ComponentEntry:
    """y = x·weight, its weight stored in fp16 beside the graph."""
    specs = [TensorSpec(name, "float32", ("batch", width)) for name in "xy"]
    borders = [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in specs]
    weight = np.random.default_rng(1).standard_normal((width, width)).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["half", "weight"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes, "product", borders[:1], borders[1:], [numpy_helper.from_array(weight, "weight")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="data")
    return ComponentEntry(
        file="model.onnx",
        files=hash_files(folder, ["model.onnx", "data"]),
        precision="fp16",
        opset=20,
        inputs=(specs[0],),
        outputs=(specs[1],),
    )


def _anonymous_bytes() -> int:
    """What this process holds of its own, mapped files apart."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", "0"), ("tf32", "1"), ("fp16", "0")])
def test_settings_on_a_gpu(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, precision: Precision, tf32: str
) -> None:
    """First as a CUDA graph, then without; seen by a stand-in for CuPy, up to the session."""
    asked: list[tuple[str, dict[str, str]]] = []

    def refuse(package: object, path: Path, options: object, providers: Any, _: object) -> None:
        asked.extend(providers)
        raise BackendError("no GPU", "Take one.")

    stream = SimpleNamespace(ptr=7)
    cuda = SimpleNamespace(get_current_stream=lambda: stream)
    monkeypatch.setattr(backend, "package", lambda target: onnxruntime)
    monkeypatch.setattr(backend, "import_package", lambda *a, **k: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(backend, "_session", refuse)
    engine = replace(tiny_bundle.manifest.engines[0], target="cuda", precision=precision)
    component = tiny_bundle.manifest.components["unet"]
    with pytest.raises(BackendError, match="no GPU"):
        backend.load(tiny_bundle.path, component=component, engine=engine, max_batch=2)
    plain = {"user_compute_stream": "7", "use_tf32": tf32}
    assert asked == [
        ("CUDAExecutionProvider", {**plain, "enable_cuda_graph": "1"}),
        ("CUDAExecutionProvider", plain),
    ]


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_without_a_gpu_the_next_engine_is_tried(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider is listed wherever the package is; CuPy, asked first, fails in its own words."""
    monkeypatch.setattr(backend, "package", lambda target: onnxruntime)
    entry = replace(tiny_bundle.manifest.engines[0], target="cuda")
    with pytest.raises(BackendError, match="NVIDIA"):
        backend.check(entry, bundle_path=tiny_bundle.path)
    engines = (entry, *tiny_bundle.manifest.engines)
    bundle = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, engines=engines))
    with open_engine(bundle, "unet") as engine:
        assert engine.entry.target == "cpu"


def test_libraries_are_loaded_from_where_pip_put_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = []

    class Package:
        @staticmethod
        def get_available_providers() -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        @staticmethod
        def preload_dlls() -> None:
            loaded.append("CUDA")
            sys.stdout.write("Failed to load libcudnn")  # as it does

    monkeypatch.setattr(onnxruntime_package, "import_package", lambda *a, **k: Package)
    for target in ("cpu", "cuda", "cuda"):
        assert onnxruntime_package.package(target) is Package
    assert loaded == ["CUDA"]
    assert capsys.readouterr().out == ""
