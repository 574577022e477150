"""ONNX Runtime's own form of a graph: the same numbers, in fewer of its nodes."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from sd_engines import open_bundle, open_engine
from sd_engines.errors import BundleError
from sd_export.onnx_export import external_places, save
from sd_export.onnx_passes import to_half
from sd_export.onnxruntime_graph import rewrite_for_onnxruntime, write_onnxruntime_graph

if TYPE_CHECKING:
    from pathlib import Path

    from sd_export import ExportReport

OWN = "model.onnxruntime.onnx"
REWRITTEN = ("unet", "vae_decoder", "vae_encoder")


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def run(path: Path, *, rows: int = 2) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    rng = np.random.default_rng(0)
    arrays = {
        border.name: rng.random([rows, *border.shape[1:]], dtype=np.float32)
        for border in session.get_inputs()
    }
    return np.asarray(session.run(None, arrays)[0])


@pytest.mark.parametrize("component", REWRITTEN)
def test_it_gives_the_same_in_operators_that_have_kernels(
    report: ExportReport, component: str
) -> None:
    graph = report.path / component / "model.onnx"
    own = graph.with_name(OWN)
    before, after = operators(graph), operators(own)
    assert before["GroupNormalization"] == after["BatchNormalization"] > 0
    assert before["Attention"] == after["MultiHeadAttention"] > 0
    assert not after.keys() & {"GroupNormalization", "Attention"}
    assert before["Transpose"] - after["Transpose"] >= 3 * before["Attention"]
    onnx.checker.check_model(own, full_check=True)
    expected = run(graph)
    assert np.linalg.norm(run(own) - expected) < 1e-5 * np.linalg.norm(expected)


def test_in_half_precision_too(report: ExportReport, tmp_path: Path) -> None:
    save(to_half(ir.load(report.path / "unet/model.onnx"), "fp16"), tmp_path / "unet")
    graph = tmp_path / "unet/model.onnx"
    (own,) = write_onnxruntime_graph(graph)
    expected = run(graph)
    error = np.linalg.norm(run(own) - expected) / np.linalg.norm(expected)
    assert 0 < error < 3e-3


@pytest.mark.parametrize("component", REWRITTEN)
def test_it_reads_the_weights_of_the_graph_beside_it(report: ExportReport, component: str) -> None:
    graph = report.path / component / "model.onnx"
    assert external_places(graph.with_name(OWN)) == external_places(graph)


def test_a_graph_without_norms_has_no_other_form(report: ExportReport) -> None:
    assert not (report.path / "text_encoder" / OWN).exists()


def test_a_graph_that_needs_its_opset_is_left_as_it_is(report: ExportReport) -> None:
    model = ir.load(report.path / "unet/model.onnx")
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.resize_inputs(4)
    attention.replace_input_with(3, attention.inputs[0])  # as if it were a mask
    before = [node.op_type for node in model.graph]
    assert not rewrite_for_onnxruntime(model)
    assert [node.op_type for node in model.graph] == before
    assert model.opset_imports == {"": 23}


def test_it_is_what_onnx_runtime_runs_and_openvino_does_not(report: ExportReport) -> None:
    entry = open_bundle(report.path).manifest.components["unet"]
    assert entry.graph_for("onnxruntime") == f"unet/{OWN}"
    assert entry.graph_for("openvino") == entry.file == "unet/model.onnx"
    for engine in report.manifest.engines:
        component = report.manifest.components[engine.component]
        assert engine.file == component.graph_for(engine.backend)


def test_one_altered_byte_of_it_is_refused(report: ExportReport, tmp_path: Path) -> None:
    bundle = open_bundle(shutil.copytree(report.path, tmp_path / "bundle"))
    path = bundle.path / "unet" / OWN
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"unet/{OWN}: altered"):
        open_engine(bundle, "unet", backend="onnxruntime")
