"""A graph in operators that ONNX Runtime has kernels of.

It runs GroupNormalization as a dozen nodes, and an Attention whose queries are laid out anew for
each head writes out all scores. Here a group is normalised as one channel, and attention is ONNX
Runtime's own operator, which is handed the heads of a token side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sd_engines.entries import own_graph
from sd_export.onnx_passes import constant

if TYPE_CHECKING:
    from pathlib import Path

_DOMAIN = "com.microsoft"
_OPSET = 21
"""The last whose InstanceNormalization ONNX Runtime has a CUDA kernel of."""
_EPSILON = 1e-5  # what GroupNormalization adds where it does not say


def write_onnxruntime_graph(onnx_path: Path) -> list[Path]:
    """Write ONNX Runtime's form of the graph at ``onnx_path`` beside it; its path, if it has one.

    It reads the same weights, by the same names.
    """
    model = ir.load(onnx_path)
    if not rewrite_for_onnxruntime(model):
        return []
    path = onnx_path.with_name(own_graph(onnx_path.name, "onnxruntime"))
    ir.save(model, path)
    return [path]


def rewrite_for_onnxruntime(model: ir.Model) -> bool:
    """Change ``model`` in place and say so; it is left as it is where there is nothing to gain."""
    nodes = list(model.graph)
    norms = [node for node in nodes if node.op_type == "GroupNormalization"]
    attentions = [node for node in nodes if _is_attention(node)]
    left = set(nodes).difference(norms, attentions)
    if not norms or not all(onnx.defs.has(node.op_type, _OPSET, node.domain) for node in left):
        return False
    for node in norms:
        _replace_norm(model.graph, node)
    for node in attentions:
        _replace_attention(model.graph, node)
    RemoveUnusedNodesPass()(model)
    model.opset_imports.update({"": _OPSET, _DOMAIN: 1})
    return True


def _is_attention(node: ir.Node) -> bool:
    """Whether it is one of queries, keys and values alone: a text encoder's has a mask."""
    return node.op_type == "Attention" and len(node.inputs) == len("qkv")


def _replace_norm(graph: ir.Graph, node: ir.Node) -> None:
    """By each group as one channel, and then a factor and an addend for each of its own."""
    values, weight, bias = (cast("ir.Value", value) for value in node.inputs)
    groups = node.attributes["num_groups"].as_int()
    epsilon = node.attributes.get_float("epsilon", _EPSILON)
    _, channels, *sizes = _sizes(values)
    tape = ir.tape.Tape()
    grouped = tape.op("Reshape", [values, _shape(graph, 0, groups, -1)])
    ones, zeros = (_filled(graph, number, groups, values) for number in (1, 0))
    normalised = tape.op("InstanceNormalization", [grouped, ones, zeros], {"epsilon": epsilon})
    laid_out = tape.op("Reshape", [normalised, _shape(graph, 0, channels, *sizes)])
    ones, zeros = (_filled(graph, number, channels, values) for number in (1, 0))
    scaled = tape.op("BatchNormalization", [laid_out, weight, bias, zeros, ones], {"epsilon": 0.0})
    _put(graph, tape, scaled, in_place_of=node)


def _replace_attention(graph: ir.Graph, node: ir.Node) -> None:
    """By MultiHeadAttention, and with it the Transpose and Reshape that follow."""
    tape = ir.tape.Tape()
    inputs = [cast("ir.Value", value) for value in node.inputs]
    attributes = {"num_heads": ir.AttrInt64("num_heads", _sizes(inputs[0])[1])}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes["scale"]
    side_by_side = [_side_by_side(value, tape, graph) for value in inputs]
    attended = tape.op("MultiHeadAttention", side_by_side, attributes, domain=_DOMAIN)
    ((transpose, _),) = node.outputs[0].uses()
    ((reshape, _),) = transpose.outputs[0].uses()
    _put(graph, tape, attended, in_place_of=reshape)


def _side_by_side(value: ir.Value, tape: ir.tape.Tape, graph: ir.Graph) -> ir.Value:
    """[n, heads, tokens, size] as [n, tokens, heads · size]: what it was made of, if it was.

    One that is repeated for the rows of a picture, after it was laid out, was not.
    """
    _, heads, tokens, size = _sizes(value)
    source = value
    for op_type in ("Transpose", "Reshape"):
        producer = source.producer()
        if producer is None or producer.op_type != op_type:
            turned = tape.op("Transpose", [value], {"perm": [0, 2, 1, 3]})
            return tape.op("Reshape", [turned, _shape(graph, 0, tokens, heads * size)])
        source = cast("ir.Value", producer.inputs[0])
    return source


def _put(graph: ir.Graph, tape: ir.tape.Tape, value: ir.Value, *, in_place_of: ir.Node) -> None:
    ir.convenience.replace_nodes_and_values(
        graph, in_place_of, [in_place_of], tape.nodes, in_place_of.outputs, [value]
    )


def _shape(graph: ir.Graph, *sizes: int) -> ir.Value:
    """What a Reshape is given; 0 is for what is there."""
    return constant(graph, f"shape_{'_'.join(map(str, sizes))}", np.array(sizes, np.int64))


def _filled(graph: ir.Graph, number: int, count: int, like: ir.Value) -> ir.Value:
    """``count`` times ``number``, in the type of ``like``."""
    array = np.full(count, number, cast("ir.DataType", like.dtype).numpy())
    return constant(graph, f"{count}_times_{number}", array)


def _sizes(value: ir.Value) -> list[int]:
    """Of each axis; the first may be a symbol."""
    return [size if isinstance(size, int) else 0 for size in cast("ir.Shape", value.shape)]
