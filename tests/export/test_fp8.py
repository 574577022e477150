"""The UNet in 8-bit floating point for TensorRT: what is rounded, what is proven, who gets it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

import sd_export
from sd_engines.bundle import open_bundle
from sd_engines.engine import listed_engines
from sd_engines.errors import ConfigError
from sd_export.fp8 import quantized_layers, to_fp8
from sd_export.onnx_export import save
from stops import Stop, stop_at
from tiny_onnx import needs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sd_engines.manifest import Manifest
    from sd_engines.spec import Precision
    from sd_export import ExportReport
    from sd_export.progress import Progress, StageEvent

needs("tensorrt_rtx")
PROMPTS = ("a red circle on the left", "a cat")


def build(
    path: Path,
    *,
    precision: Precision | None = "fp8",
    prompts: Sequence[str] | None = PROMPTS,
    progress: Progress = lambda event: None,
) -> Manifest:
    return sd_export.build(
        path,
        backends=("tensorrt-rtx",),
        precision=precision,
        target="sm89",
        calibration_prompts=prompts,
        progress=progress,
    )


@pytest.fixture(scope="module")
def bundle(report: ExportReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``report``'s bundle with plans for a card that has fp8."""
    path = shutil.copytree(report.path, tmp_path_factory.mktemp("fp8") / "bundle")
    build(path)
    return path


def test_it_stands_beside_the_exact_engines(bundle: Path, report: ExportReport) -> None:
    opened = open_bundle(bundle)
    opened.verify()
    assert opened.manifest.components == report.manifest.components
    built = {e.component: e for e in opened.manifest.engines if e.backend == "tensorrt-rtx"}
    assert built.pop("unet").precision == "fp8"
    assert {e.precision for e in built.values()} <= {"tf32", "fp32"}
    (measured,) = (c for c in opened.manifest.certificate if c.precision == "fp8")
    assert (measured.component, measured.backend) == ("unet", "onnxruntime")
    assert measured.reference.startswith("the bundle's ONNX, fp32, onnxruntime")
    assert measured.reference.endswith("along a picture")
    assert 1e-3 < measured.figure < measured.tolerance

    manifest = build(bundle, precision=None, prompts=None)
    fp8, fp16 = (
        e for e in manifest.engines if (e.component, e.backend) == ("unet", "tensorrt-rtx")
    )
    assert (fp8.precision, fp16.precision) == ("fp8", "fp16")
    assert fp8.file == fp16.file.replace("unet.engine", "unet.fp8.engine")
    assert fp8.flags.keys() == {"calibration", "workspace_bytes"}
    assert (bundle / fp8.file).is_file()
    assert (bundle / fp16.file).is_file()
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_nobody_gets_it_who_did_not_ask(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert "fp8" not in {e.precision for e in listed_engines(opened, "unet")}
    (asked,) = listed_engines(opened, "unet", precision="fp8")
    assert asked.backend == "tensorrt-rtx"


def test_it_is_made_again_only_for_other_prompts(bundle: Path) -> None:
    before = (bundle / "bundle.json").read_bytes()
    events: list[StageEvent] = []
    progress = stop_at("unet", "calibrate", events=events)
    build(bundle, progress=progress)
    assert "unet" in {e.component for e in events if e.detail == "already there"}
    with pytest.raises(Stop):
        build(bundle, prompts=None, progress=progress)
    assert (bundle / "bundle.json").read_bytes() == before


def test_a_bundle_of_nothing_else(smallest: Path, tmp_path: Path) -> None:
    report = sd_export.export(
        smallest,
        tmp_path / "bundle",
        backends=("tensorrt-rtx",),
        precision="fp8",
        calibration_prompts=PROMPTS,
    )
    manifest = report.manifest
    assert manifest.components["unet"].precision == "fp16"
    (engine,) = (e for e in manifest.engines if e.component == "unet")
    assert engine.precision == "fp8"
    (measured,) = (c for c in manifest.certificate if c.precision == "fp8")
    assert measured.reference.startswith("the bundle's ONNX, fp16, onnxruntime")
    assert listed_engines(open_bundle(report.path), "unet") == [engine]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.fixture
def graph(report: ExportReport) -> ir.Graph:
    return ir.load(report.path / "unet/model.onnx").graph


def test_layers_that_all_pixels_hang_on_are_left(graph: ir.Graph) -> None:
    weights = {node.inputs[1].name for node in quantized_layers(graph)}  # type: ignore[union-attr]
    left = {
        name
        for node in graph
        if node.op_type in ("Conv", "MatMul", "Gemm")
        and (name := node.inputs[1].name) in graph.initializers  # type: ignore[union-attr]
        and name not in weights
    }
    assert {"unet.conv_in.weight", "unet.conv_out.weight"} <= left
    assert "unet.time_embedding.linear_1.weight" in left
    assert "unet.down_blocks.0.resnets.0.time_emb_proj.weight" in left
    assert "unet.down_blocks.0.resnets.0.conv2.weight" in weights
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight.T" in weights
    assert len(weights) > 5 * len(left)


def test_weights_are_the_nearest_of_the_format(report: ExportReport, tmp_path: Path) -> None:
    """By torch's own E4M3, over the scale that lies beside them."""
    model = ir.load(report.path / "unet/model.onnx")
    layers = quantized_layers(model.graph)
    exact = {node.name: node.inputs[1].const_value.numpy() for node in layers}  # type: ignore[union-attr]
    weights = {node.inputs[1].name for node in layers}  # type: ignore[union-attr]
    to_fp8(model, dict.fromkeys((node.inputs[0].name for node in layers), 3.0))  # type: ignore[arg-type, union-attr]
    saved = onnx.load(save(model, tmp_path / "fp8")[0]).graph
    stored = {tensor.name: tensor for tensor in saved.initializer}
    made_by = {output: node for node in saved.node for output in node.output}
    assert not stored.keys() & weights, "those that were rounded are gone"
    made = [node for node in saved.node if node.name in exact]
    assert len(made) == len(exact)
    for layer in made:
        value, weight = (made_by[name] for name in layer.input[:2])
        assert (value.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert made_by[value.input[0]].op_type == "QuantizeLinear"
        scale = numpy_helper.to_array(stored[weight.input[1]])
        found = numpy_helper.to_array(stored[weight.input[0]]).astype(np.float32)
        wanted = torch.from_numpy(exact[layer.name] / scale).to(torch.float8_e4m3fn)
        np.testing.assert_array_equal(found, wanted.float().numpy())
        assert 440 <= abs(found).max() <= 448
        assert numpy_helper.to_array(stored[value.input[1]]) == np.float16(3 / 448)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_is_tensorrts(tmp_path: Path, backend: str) -> None:
    for command in (
        lambda: sd_export.export("./none", tmp_path / "b", backends=(backend,), precision="fp8"),
        lambda: sd_export.build(tmp_path / "b", backends=(backend,), precision="fp8"),
    ):
        with pytest.raises(ConfigError, match=f"fp8 is for TensorRT, not for {backend}") as caught:
            command()
        assert "--backend openvino --precision int8" in caught.value.hint


def test_a_unet_that_caches_is_refused(cached_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="fp8 is not for a UNet that caches") as caught:
        build(cached_bundle)
    assert "--precision fp16" in caught.value.hint
