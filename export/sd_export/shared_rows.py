"""Lets a graph compute once what all rows of a picture share.

Guidance runs the UNet on two rows a picture, one beside the prompt and one beside the negative one.
Both see the same sample at the same timestep, so all that comes before the first look at the prompt
is the same for both: the first convolutions, and the first, largest self-attention. Nothing is
approximated; every other program computes it twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sd_engines.spec import BATCH, PICTURES
from sd_export.onnx_passes import constant

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from sd_engines.spec import TensorSpec


def share_rows(model: ir.Model, inputs: Collection[TensorSpec]) -> ir.Model:
    """Run on `PICTURES` what depends on ``inputs`` with that axis alone; ``model`` is changed.

    It must have been traced with `BATCH` in the place of `PICTURES`. What rows then need of it is
    repeated for them: row i is of picture i modulo their number. Vectors, such as what each layer
    makes of the timestep, are not worth a repetition each: rows make those for themselves.
    """
    by_row = {spec.name for spec in inputs if BATCH in spec.shape}
    shared = {spec.name for spec in inputs if PICTURES in spec.shape}
    if not (by_row and shared):
        return model
    graph = model.graph
    row_nodes = _reached(graph, (value for value in graph.inputs if value.name in by_row))
    picture_nodes = _reached(graph, (value for value in graph.inputs if value.name in shared))
    picture_nodes -= row_nodes
    for node in reversed(list(graph)):
        users = [user for value in node.outputs for user, _ in value.uses()]
        makes_vectors = all(map(_is_vector, node.outputs))
        if node in picture_nodes and makes_vectors and row_nodes.issuperset(users):
            picture_nodes.remove(node)
            row_nodes.add(node)
    for value in graph.inputs:
        if value.name in shared:
            _rename_axis(value)
    for node in picture_nodes:
        for value in node.outputs:
            _rename_axis(value)
    _repeat(graph, row_nodes, picture_nodes, shared=shared, row_input=min(by_row))
    return model


def _reached(graph: ir.Graph, values: Iterable[ir.Value]) -> set[ir.Node]:
    """The nodes that depend on any of ``values``."""
    reached = set(values)
    nodes = set()
    for node in graph:  # in topological order
        if any(value in reached for value in node.inputs):
            nodes.add(node)
            reached.update(node.outputs)
    return nodes


def _is_vector(value: ir.Value) -> bool:
    """Whether ``value`` is [batch, n], or that with axes of 1 behind it."""
    return value.shape is not None and all(size == 1 for size in list(value.shape)[2:])


def _rename_axis(value: ir.Value) -> None:
    if value.shape is not None:
        sizes = [PICTURES if getattr(s, "value", None) == BATCH else s for s in value.shape]
        value.shape = ir.Shape(sizes)


def _repeat(
    graph: ir.Graph,
    row_nodes: Collection[ir.Node],
    picture_nodes: Collection[ir.Node],
    *,
    shared: Collection[str],
    row_input: str,
) -> None:
    """Put a Tile wherever a value of pictures goes into a node of rows."""
    inputs = {value.name: value for value in graph.inputs}
    counts = [
        ir.node("Shape", [value], attributes={"start": 0, "end": 1})
        for value in (inputs[row_input], inputs[min(shared)])
    ]
    ratio = ir.node("Div", [node.outputs[0] for node in counts])
    graph.insert_before(graph[0], (*counts, ratio))
    last, repeats = ratio, {}
    tiled: dict[ir.Value, ir.Value] = {}
    for node in [n for n in graph if n in row_nodes]:
        for index, value in enumerate(node.inputs):
            if value is None or not (value.producer() in picture_nodes or value.name in shared):
                continue
            if value not in tiled:
                rank = len(value.shape or ())
                if rank not in repeats:
                    repeats[rank] = _repeats(graph, ratio, rank)
                    graph.insert_after(last, repeats[rank])
                    last = repeats[rank]
                tile = ir.node("Tile", [value, repeats[rank].outputs[0]])
                (tiled[value],) = tile.outputs
                tiled[value].name = f"{value.name}.rows"
                tiled[value].type = value.type
                sizes = list(value.shape or ())
                tiled[value].shape = ir.Shape([BATCH, *sizes[1:]])
                producer = value.producer()
                graph.insert_after(last if producer is None else producer, tile)
            node.replace_input_with(index, tiled[value])


def _repeats(graph: ir.Graph, ratio: ir.Node, rank: int) -> ir.Node:
    """``rank`` numbers: how many rows a picture has, then ones. A Tile's second input."""
    if rank == 1:
        return ir.node("Identity", [ratio.outputs[0]])
    ones = constant(graph, f"ones_{rank - 1}", np.ones(rank - 1, np.int64))
    return ir.node("Concat", [ratio.outputs[0], ones], attributes={"axis": 0})
