"""Half precision inside a graph: right numbers, float32 border, valid ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from sd_export.onnx_export import save
from sd_export.onnx_passes import to_half

if TYPE_CHECKING:
    from sd_export import ExportReport
    from sd_export.onnx_passes import HalfPrecision


def inputs(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((rows, 4, 8, 8), dtype=np.float32),
        "timestep": np.linspace(999, 1, rows, dtype=np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, 77, 32), dtype=np.float32),
    }


def run(path: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
    (result,) = onnxruntime.InferenceSession(path).run(None, arrays)
    return np.asarray(result)


def test_fp16_is_close_and_half_the_size(report: ExportReport, tmp_path: Path) -> None:
    original = report.path / "unet/model.onnx"
    save(to_half(ir.load(original), "fp16"), tmp_path / "unet")
    converted = tmp_path / "unet/model.onnx"
    onnx.checker.check_model(converted, full_check=True)
    arrays = inputs(5)
    expected, found = run(original, arrays), run(converted, arrays)
    assert found.dtype == np.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 3e-3  # the lower end: it really computes in half
    sizes = [path.with_name("model.onnx_data").stat().st_size for path in (original, converted)]
    assert sizes[1] < 0.52 * sizes[0]


def test_large_timesteps_keep_their_digits(report: ExportReport, tmp_path: Path) -> None:
    """In fp16 sin(999) is wrong in its first digit; the embedding must stay float32."""
    original = report.path / "unet/model.onnx"
    save(to_half(ir.load(original), "fp16"), tmp_path / "unet")
    arrays = inputs(2)
    arrays["timestep"] = np.array([999.0, 998.6], dtype=np.float32)
    for name in ("sample", "encoder_hidden_states"):
        arrays[name][1] = arrays[name][0]
    expected = run(original, arrays)
    found = run(tmp_path / "unet/model.onnx", arrays)
    change = expected[1] - expected[0]
    assert np.linalg.norm((found[1] - found[0]) - change) < 0.5 * np.linalg.norm(change)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_border_stays_float32_and_no_float32_weight_is_left(
    report: ExportReport, tmp_path: Path, precision: HalfPrecision
) -> None:
    for component in ("unet", "vae_decoder", "text_encoder"):
        original = report.path / component / "model.onnx"
        save(to_half(ir.load(original), precision), tmp_path / component)
        path = tmp_path / component / "model.onnx"
        onnx.checker.check_model(path, full_check=True)
        before, after = onnx.load(original), onnx.load(path)
        assert list(after.graph.input) == list(before.graph.input)
        assert [v.name for v in after.graph.output] == [v.name for v in before.graph.output]
        types = [v.type.tensor_type.elem_type for v in after.graph.output]
        assert types == [onnx.TensorProto.FLOAT]
        floats = set(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.BOOL}
        large = [
            tensor
            for tensor in after.graph.initializer
            if np.prod(tensor.dims) > 256 and tensor.data_type in floats
        ]
        half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
        assert {t.data_type for t in large} == {half}


def test_what_is_too_large_becomes_the_largest_and_masks_stay_infinite() -> None:
    """An infinite weight would make every picture black."""
    given = np.array([1e5, -1e5, 2.0, -np.inf], np.float32)
    nodes = [
        onnx.helper.make_node("Constant", [], ["own"], value=onnx.numpy_helper.from_array(given)),
        onnx.helper.make_node("Mul", ["x", "weight"], ["product"]),
        onnx.helper.make_node("Max", ["product", "own"], ["y"]),
    ]
    borders = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in ("x", "y")
    ]
    weights = [onnx.numpy_helper.from_array(given, "weight")]
    graph = onnx.helper.make_graph(nodes, "graph", borders[:1], borders[1:], weights)
    opset = [onnx.helper.make_opsetid("", 23)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    for name in ("product", "own"):
        model.graph.value_info.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4])
        )
    half = ir.to_proto(to_half(ir.from_proto(model), "fp16"))
    onnx.checker.check_model(half, full_check=True)
    (weight,) = map(onnx.numpy_helper.to_array, half.graph.initializer)
    (own,) = (
        onnx.numpy_helper.to_array(node.attribute[0].t)
        for node in half.graph.node
        if node.op_type == "Constant"
    )
    for found in (weight, own):
        assert found.dtype == np.float16
        assert found.tolist() == [65504.0, -65504.0, 2.0, -np.inf]


def test_graphs_carry_no_trace_of_the_machine_that_made_them(report: ExportReport) -> None:
    for path in report.path.glob("*/model.onnx"):
        data = path.read_bytes()
        assert b"site-packages" not in data
        assert b".py" not in data
        assert str(Path.home()).encode() not in data
