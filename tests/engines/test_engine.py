"""open_engine: which of a bundle's engines is taken, and what is said where none can be."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest

import sd_engines
from sd_engines import open_engine
from sd_engines.backends import onnxruntime
from sd_engines.backends.onnxruntime import OnnxRuntimeBinding, OnnxRuntimeEngine
from sd_engines.bundle import Bundle
from sd_engines.cores import usable_cores
from sd_engines.engine import build_engine
from sd_engines.errors import BackendError, BundleError, ConfigError, EngineMismatchError
from tiny_onnx import PROFILE, needs, stale_plan, unet_arrays

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sd_engines import Engine
    from sd_engines.entries import FileEntry


def _name(engine: Engine) -> str:
    return type(engine).__name__


def test_auto_takes_the_fastest_that_is_installed(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("openvino")
    needs("onnxruntime")
    with open_engine(tiny_bundle, "unet") as engine:
        assert _name(engine) == "OpenVinoEngine"
        assert engine.entry == tiny_bundle.manifest.engines[1]
    monkeypatch.setitem(sys.modules, "openvino", None)
    with open_engine(tiny_bundle, "unet") as engine:
        assert _name(engine) == "OnnxRuntimeEngine"
        engine(**unet_arrays(1))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="no engine of unet opens here") as caught:
        open_engine(tiny_bundle, "unet")
    assert "openvino" in caught.value.message
    assert "onnxruntime" in caught.value.message
    assert caught.value.hint == 'pip install "sd-toolkit[cpu]"'


def test_a_folder_whose_name_is_not_utf8(tiny_bundle: Bundle) -> None:
    needs("openvino")
    needs("onnxruntime")
    folder = tiny_bundle.path.rename(tiny_bundle.path.with_name(os.fsdecode(b"caf\xe9")))
    bundle = Bundle(folder, tiny_bundle.manifest)
    with pytest.raises(BackendError, match=r"path that is not UTF-8: .*model\.onnx") as caught:
        open_engine(bundle, "unet", backend="onnxruntime")
    assert "another backend" in caught.value.hint
    with open_engine(bundle, "unet") as engine:
        assert _name(engine) == "OpenVinoEngine"


def test_auto_says_why_it_passes_over_a_stale_plan(
    tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    needs("tensorrt_rtx")
    stale = stale_plan("fp32")
    manifest = replace(tiny_bundle.manifest, engines=(*tiny_bundle.manifest.engines, stale))
    bundle = Bundle(tiny_bundle.path, manifest)
    with (
        caplog.at_level(logging.WARNING, logger="sd_engines"),
        open_engine(bundle, "unet") as engine,
    ):
        assert _name(engine) != "TensorRtEngine"
    assert "built by tensorrt-rtx 1.0.0" in caplog.text
    with pytest.raises(EngineMismatchError, match="is installed") as caught:
        open_engine(bundle, "unet", backend="tensorrt-rtx")
    again = f"sd-export build {bundle.path} --backend tensorrt-rtx --precision fp32"
    assert caught.value.hint == again
    assert caught.value.exit_code == 3


def test_unknown_backend(tiny_bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="unknown backend 'opnvino'") as caught:
        open_engine(tiny_bundle, "unet", backend="opnvino")
    assert "Did you mean 'openvino'" in caught.value.hint
    unet = tiny_bundle.manifest.components["unet"]
    with pytest.raises(ConfigError, match="unknown backend 'auto'"):
        build_engine(
            "auto",
            tiny_bundle.path / unet.file,
            output_dir=tiny_bundle.path,
            component="unet",
            entry=unet,
            profile=PROFILE,
        )


def test_what_the_bundle_lacks(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="has no component 'vae'"):
        open_engine(tiny_bundle, "vae")
    with pytest.raises(BundleError, match="has no tensorrt engine of unet") as caught:
        open_engine(tiny_bundle, "unet", backend="tensorrt")
    assert caught.value.hint == f"sd-export build {tiny_bundle.path} --backend tensorrt"
    with pytest.raises(BundleError, match="has no fp16 engine of unet") as caught:
        open_engine(tiny_bundle, "unet", precision="fp16")
    assert caught.value.hint == "Export the checkpoint again with --precision fp16."
    with pytest.raises(BundleError, match="has no int8 engine of unet") as caught:
        open_engine(tiny_bundle, "unet", precision="int8")
    assert caught.value.hint.endswith("--backend openvino --precision int8")
    with pytest.raises(ConfigError, match="unknown precision 'int7'") as unknown:
        open_engine(tiny_bundle, "unet", precision="int7")  # type: ignore[arg-type]
    assert "'int8'" in unknown.value.hint
    empty = Bundle(tiny_bundle.path, replace(tiny_bundle.manifest, engines=()))
    with pytest.raises(BundleError, match="has no engine of unet") as caught:
        open_engine(empty, "unet")
    assert "--backend onnxruntime" in caught.value.hint


@pytest.mark.parametrize("threads", [0, -1])
def test_threads(tiny_bundle: Bundle, threads: int) -> None:
    with pytest.raises(ConfigError, match=f"threads is {threads}"):
        open_engine(tiny_bundle, "unet", threads=threads)


def test_public_names() -> None:
    for name in sd_engines.__all__:
        assert getattr(sd_engines, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'open_bundel'"):
        sd_engines.open_bundel  # noqa: B018


def test_usable_cores_obeys_the_affinity() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
    first = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, [{first}])\n"
        "from sd_engines.cores import usable_cores; print(usable_cores())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout == b"1\n"


def test_weights_are_hashed_while_the_engine_opens(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("onnxruntime")
    unet = tiny_bundle.manifest.components["unet"]
    (weights,) = (name for name in unet.files if name != unet.file)
    hashing, compiled, closed = Event(), Event(), Event()
    real_hash, real_bind = Bundle._verify, OnnxRuntimeEngine.bind

    def hash_late(bundle: Bundle, files: Mapping[str, FileEntry], **options: str) -> None:
        if weights in files:
            hashing.set()
            assert compiled.wait(timeout=60), "the engine waits for the hash"
        real_hash(bundle, files, **options)

    def bind(engine: OnnxRuntimeEngine, batch: int, **options: int) -> OnnxRuntimeBinding:
        assert hashing.wait(timeout=60), "the hash waits for the engine"
        binding = real_bind(engine, batch, **options)
        compiled.set()
        return binding

    monkeypatch.setattr(Bundle, "_verify", hash_late)
    monkeypatch.setattr(OnnxRuntimeEngine, "bind", bind)
    monkeypatch.setattr(OnnxRuntimeEngine, "close", lambda _: closed.set())
    options: dict[str, Any] = {"backend": "onnxruntime", "batches": [(2, 1)]}
    open_engine(tiny_bundle, "unet", **options)
    assert not closed.is_set()
    data = bytearray((tiny_bundle.path / weights).read_bytes())
    data[-1] ^= 1
    (tiny_bundle.path / weights).write_bytes(data)
    with pytest.raises(BundleError, match="altered"):
        open_engine(tiny_bundle, "unet", **options)
    assert closed.is_set()


def test_a_graph_is_hashed_before_it_is_read(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("onnxruntime")
    graph = tiny_bundle.path / tiny_bundle.manifest.components["unet"].file
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(data)
    read: list[object] = []
    monkeypatch.setattr(onnxruntime, "load", lambda *_, **__: read.append(0))
    with pytest.raises(BundleError, match="altered"):
        open_engine(tiny_bundle, "unet", backend="onnxruntime")
    assert read == []
