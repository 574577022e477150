"""Rewrites of ONNX graphs: what tracing leaves behind, and half precision.

torch's exporter has already folded small constants. Fusions are left to the backends, which make
their own from the whole Attention and GroupNormalization operators of opset 23.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants

if TYPE_CHECKING:
    from collections.abc import Iterable

HalfPrecision: TypeAlias = Literal["fp16", "bf16"]
_HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FLOAT = ir.DataType.FLOAT
TRANSPOSED = ".T"
"""How the name of a weight ends that lies [in, out], not [out, in] as in its checkpoint."""
# inputs that ONNX wants in float32 whatever the operator computes in
_ALWAYS_FLOAT = {"Resize": (1, 2)}
_NO_LIMIT = 2**40  # bytes
# timesteps reach 1000, and half precision has no digits left after the point there
_ANGLES = ("Sin", "Cos")


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """``array`` as an initializer of ``graph``; that of this ``name`` where there is one."""
    if name not in graph.initializers:
        ir.tape.Tape(graph).initializer(ir.tensor(array, name=name))
    return graph.initializers[name]


def tidy(model: ir.Model) -> ir.Model:
    """Drop what tracing leaves: traces of source lines, dead nodes, constants stored twice."""
    _name_weights(model.graph)
    if any(node.op_type == "BatchNormalization" for node in model.graph):
        _fold_weights(model)
    for rewrite in (
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.DeduplicateInitializersPass(size_limit=16),  # weights stay their layer's own
        passes.ClearMetadataAndDocStringPass(),
    ):
        rewrite(model)
    model.graph.name = "graph"
    return model


def _fold_weights(model: ir.Model) -> None:
    """Compute what follows from weights alone, however large, where the exporter left it.

    A BiT's convolutions normalise their own weights as if they were a batch: on every run, and in
    a way that TensorRT does not know.
    """
    fold_constants(model, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT)


def _name_weights(graph: ir.Graph) -> None:
    """Call the weights of linear layers after them; the exporter left them transposed, nameless."""
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer():
            continue
        scopes = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
        if not scopes[-1].startswith("linear"):
            continue  # a constant that a model multiplies with, and no layer's
        name = f"{scopes[-2]}.weight{TRANSPOSED}"
        if name in graph.initializers:  # a layer that is called twice
            node.replace_input_with(1, graph.initializers[name])
        else:
            weight.name = name


def to_half(model: ir.Model, precision: HalfPrecision) -> ir.Model:
    """Compute in ``precision`` inside, keep float32 at the border; ``model`` is changed in place.

    What leads to a sine or cosine (the timestep's embedding) stays float32: angles reach 1000.
    Weights are converted when they are written, one at a time.
    """
    half = _HALF[precision]
    graph = model.graph
    kept = _ancestors(node for node in graph if node.op_type in _ANGLES)
    halved: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node in kept:
            continue
        always_float = _ALWAYS_FLOAT.get(node.op_type, ())
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != _FLOAT or index in always_float:
                continue
            producer = value.producer()
            if producer is not None and producer not in kept:
                continue
            if value not in halved:
                make = _half_initializer if value.is_initializer() else _cast
                halved[value] = make(graph, value, half)
            node.replace_input_with(index, halved[value])
        _retype(node, half)
    for index, output in enumerate(list(graph.outputs)):
        if output.dtype == half:
            graph.outputs[index] = _cast_output(graph, output)
    passes.RemoveUnusedNodesPass()(model)
    return model


def _ancestors(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [p for v in node.inputs if v is not None and (p := v.producer()) is not None]
    return found


def _half_initializer(graph: ir.Graph, value: ir.Value, half: ir.DataType) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None  # noqa: S101  (its caller checked)
    name = f"{value.name}.{half.name.lower()}"
    shape = ir.Shape(tensor.shape.numpy())

    def convert() -> ir.TensorProtocol:
        return ir.tensor(_clipped(tensor.numpy(), half), dtype=half, name=name)

    lazy = ir.LazyTensor(convert, dtype=half, shape=shape, name=name)
    new = ir.Value(name=name, shape=shape, type=ir.TensorType(half), const_value=lazy)
    graph.register_initializer(new)
    return new


def _clipped(array: np.ndarray, half: ir.DataType) -> np.ndarray:
    """``array`` in half precision; what is too large becomes the largest, masks stay infinite."""
    dtype = half.numpy()
    if half is ir.DataType.FLOAT16:
        largest = np.finfo(np.float16).max
        array = np.where(np.isfinite(array), np.clip(array, -largest, largest), array)
    return array.astype(dtype)


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    node = ir.node("Cast", [value], attributes={"to": dtype})
    (result,) = node.outputs
    result.name = f"{value.name}.{dtype.name.lower()}"
    result.dtype = dtype
    result.shape = value.shape
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return result


def _cast_output(graph: ir.Graph, output: ir.Value) -> ir.Value:
    node = ir.node("Cast", [output], attributes={"to": _FLOAT})
    (result,) = node.outputs
    result.name, output.name = output.name, f"{output.name}.half"
    result.dtype = _FLOAT
    result.shape = output.shape
    graph.append(node)
    return result


def _retype(node: ir.Node, half: ir.DataType) -> None:
    """Make ``node`` give half where it gave float32."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(half))
    if node.op_type == "ConstantOfShape" and "value" not in node.attributes:  # a zero, in float32
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.zeros(1, np.float32)))
    attribute = node.attributes.get("value")
    if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.dtype == _FLOAT:
            node.attributes["value"] = ir.AttrTensor(
                "value", ir.tensor(_clipped(tensor.numpy(), half), dtype=half)
            )
    for value in node.outputs:
        if value.dtype == _FLOAT:
            value.dtype = half
