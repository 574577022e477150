"""The UNet in 8-bit floating point (E4M3) for TensorRT: weights and inputs of its large layers.

One scale a tensor puts its largest number at E4M3's own, 448 (Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433); what an input's is, the bundle's own pictures tell. What a wrong
digit would reach all pixels through is left in fp16, and so is all between the layers. Q/DQ pairs
say so in the graph, which is how TensorRT is told.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final, cast

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sd_engines.engine import load_engine
from sd_engines.spec import TensorSpec
from sd_export.graph_proof import proving_engine
from sd_export.half_graph import converted_entry
from sd_export.memory import release
from sd_export.onnx_export import save
from sd_export.onnx_passes import constant, to_half
from sd_export.precision import is_quantized

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from sd_engines.bundle import ComponentEntry
    from sd_engines.spec import Profile
    from sd_export.calibration import Calibration
    from sd_export.progress import StageLog
    from sd_export.verify import Proof

_E4M3: Final = ir.DataType.FLOAT8E4M3FN
_LARGEST: Final = 448.0
_LEAST_SCALE: Final = 2.0**-14
"""The least that fp16 holds with all its digits, in which a graph's scales may be."""
_LARGE_LAYERS: Final = ("Conv", "MatMul", "Gemm")
_RANGES: Final = "ranges"


@contextmanager
def fp8_graph(
    onnx_path: Path,
    output_dir: Path,
    component: str,
    *,
    entry: ComponentEntry,
    profile: Profile,
    calibration: Calibration,
    log: StageLog,
    halved: bool = True,
) -> Iterator[tuple[Path, Proof]]:
    """A copy of the graph at ``onnx_path`` in fp8 and fp16, for as long as the block runs.

    And what it can be held to: a picture that it was not calibrated on. Not ``halved``, what is not
    in fp8 is as it was.
    """
    folder = output_dir.parent / "fp8" / component
    try:
        with log.stage(component, "calibrate") as result:
            inputs, proof = calibration.draw()
            model = ir.load(onnx_path)
            names = _report_ranges(model)
            ranges = _measured_ranges(
                save(model, folder)[0], component, entry, profile, inputs, names=names
            )
            result.detail = f"{len(calibration.prompts)} prompts, {len(inputs)} steps"
        with log.stage(component, "convert to fp8") as result:
            model = ir.load(onnx_path)
            to_fp8(model, ranges)
            if halved and entry.precision == "fp32":
                to_half(model, "fp16")
            saved = save(model, folder)
            result.bytes = sum(path.stat().st_size for path in saved)
        yield saved[0], proof
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)


def quantized_layers(graph: ir.Graph) -> list[ir.Node]:
    """Large layers with weights that `is_quantized` names, but for the last one of all."""
    seen = {value: frozenset([value.name or ""]) for value in graph.inputs}
    found = []
    for node in graph:
        inputs = frozenset[str]().union(*(seen[v] for v in node.inputs if v in seen))
        seen |= dict.fromkeys(node.outputs, inputs)
        if node.op_type in _LARGE_LAYERS and _weight(node).is_initializer():
            found.append((node, inputs))
    return [node for node, inputs in found[:-1] if is_quantized(inputs)]


def to_fp8(model: ir.Model, ranges: Mapping[str, float]) -> None:
    """Put Q/DQ pairs before `quantized_layers`; ``ranges`` are of their inputs, by name."""
    graph = model.graph
    rounded: dict[ir.Value, ir.Value] = {}
    for node in quantized_layers(graph):
        for index, value in enumerate((_input(node), _weight(node))):
            if value not in rounded:
                pair = _rounded_weight(graph, value) if index else _rounded(graph, value, ranges)
                graph.insert_before(node, pair)
                (rounded[value],) = pair[-1].outputs
            node.replace_input_with(index, rounded[value])
    RemoveUnusedNodesPass()(model)


def _rounded(graph: ir.Graph, value: ir.Value, ranges: Mapping[str, float]) -> list[ir.Node]:
    """``value`` to fp8 and back."""
    scale = _scale(graph, value, ranges[value.name or ""])
    zero = constant(graph, "fp8_zero", np.zeros((), _E4M3.numpy()))
    tape = ir.tape.Tape()
    stored = tape.op("QuantizeLinear", [value, scale, zero])
    stored.shape, stored.type = value.shape, ir.TensorType(_E4M3)
    _back(tape, stored, scale, value)
    return list(tape.nodes)


def _rounded_weight(graph: ir.Graph, weight: ir.Value) -> list[ir.Node]:
    """A weight that lies in fp8, and back; it is converted when it is written."""
    tensor = cast("ir.TensorProtocol", weight.const_value)
    scale = _scale(graph, weight, float(np.abs(tensor.numpy()).max()))
    factor = cast("ir.TensorProtocol", scale.const_value).numpy().astype(np.float32)

    def convert() -> ir.TensorProtocol:
        return ir.tensor((tensor.numpy() / factor).astype(_E4M3.numpy()), name=name)

    name, shape = f"{weight.name}.fp8", ir.Shape(tensor.shape.numpy())
    lazy = ir.LazyTensor(convert, dtype=_E4M3, shape=shape, name=name)
    stored = ir.Value(name=name, shape=shape, type=ir.TensorType(_E4M3), const_value=lazy)
    graph.register_initializer(stored)
    tape = ir.tape.Tape()
    _back(tape, stored, scale, weight)
    return list(tape.nodes)


def _back(tape: ir.tape.Tape, stored: ir.Value, scale: ir.Value, like: ir.Value) -> None:
    value = tape.op("DequantizeLinear", [stored, scale])
    value.shape, value.type = like.shape, ir.TensorType(cast("ir.DataType", like.dtype))


def _scale(graph: ir.Graph, value: ir.Value, largest: float) -> ir.Value:
    """What ``largest`` is divided by to be E4M3's: a number of fp16, in the type of ``value``."""
    scale = np.float16(max(largest / _LARGEST, _LEAST_SCALE))
    dtype = cast("ir.DataType", value.dtype).numpy()
    return constant(graph, f"{value.name}.scale", np.array(scale, dtype))


def _report_ranges(model: ir.Model) -> list[str]:
    """Make the largest inputs of `quantized_layers` the graph's one output; their names."""
    graph = model.graph
    values = list(dict.fromkeys(map(_input, quantized_layers(graph))))
    one = constant(graph, "one_axis", np.array([-1]))
    tape = ir.tape.Tape()
    largest = []
    for value in values:
        number = tape.op("ReduceMax", [tape.op("Abs", [value])], {"keepdims": 0})
        largest.append(tape.op("Reshape", [number, one]))
    ranges = tape.op("Cast", [tape.op("Concat", largest, {"axis": 0})], {"to": ir.DataType.FLOAT})
    ranges.name, ranges.dtype, ranges.shape = _RANGES, ir.DataType.FLOAT, ir.Shape([len(values)])
    graph.extend(tape.nodes)
    graph.outputs[:] = [ranges]
    RemoveUnusedNodesPass()(model)
    return [value.name or "" for value in values]


def _measured_ranges(
    path: Path,
    component: str,
    entry: ComponentEntry,
    profile: Profile,
    inputs: Sequence[Mapping[str, np.ndarray]],
    *,
    names: Sequence[str],
) -> dict[str, float]:
    """By name, the largest that the graph at ``path`` reports on any of ``inputs``."""
    output = TensorSpec(_RANGES, "float32", (len(names),))
    entry = replace(converted_entry(path, entry, entry.precision), outputs=(output,))
    with load_engine(
        path,
        component=entry,
        engine=proving_engine(path, component, entry, profile),
        max_batch=profile.max_batch(component, entry.inputs),
    ) as engine:
        largest = np.max([engine(**step)[_RANGES] for step in inputs], axis=0)
    release()
    return dict(zip(names, largest.tolist(), strict=True))


def _input(node: ir.Node) -> ir.Value:
    return cast("ir.Value", node.inputs[0])


def _weight(node: ir.Node) -> ir.Value:
    return cast("ir.Value", node.inputs[1])
