"""What one call of a component must compute and move, counted from its ONNX graph.

FLOPs are those of products and sums in convolutions, matrix products and attention, two for each
multiply-add, as everybody counts them; what is done element by element is left out. Bytes are the
least that any engine moves: the weights, the inputs and the outputs, each once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final

from sd_engines.border import import_package
from sd_engines.errors import BundleError
from sd_engines.spec import BATCH, PICTURES, TEXT_ENCODERS
from sd_runtime.plan import plan
from sd_runtime.tiles import Tiling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sd_engines.spec import Precision
    from sd_runtime import Pipeline, Request
    from sd_runtime.timing import Timings

Shape = tuple[int, ...]
ITEM_BYTES: Final[Mapping[str, int]] = {
    "fp32": 4,
    "tf32": 4,
    "fp16": 2,
    "bf16": 2,
    "fp8": 1,
    "int8": 1,
}


@dataclass(frozen=True)
class Work:
    """One call's floating-point operations, and the least bytes it moves."""

    flops: int
    bytes: int


def request_work(
    pipeline: Pipeline, request: Request, timings: Timings
) -> dict[str, dict[str, float]]:
    """What answering ``request`` asked of each component that ran, as `Measurement.work` holds it.

    "calls" are those that ``timings`` saw; "flops" and "bytes" are an average call's, since the
    last batch may be smaller than the others.
    """
    size, left = pipeline.profile.batch_size, request.num_images
    batches = [min(size, left - first) for first in range(0, left, size)]
    planned = plan(request, pipeline.bundle.manifest)
    whole = [(n, n) for n in batches]
    rows = {name: [(1, 1)] for name in TEXT_ENCODERS}
    rows |= {"vae_decoder": whole, "safety_checker": whole}
    for name in ("unet", "unet_shallow"):
        rows[name] = [
            (n * (2 if row in planned.guided_rows else 1), n)
            for n in batches
            for row in range(planned.table.num_rows)
            if (name == "unet_shallow") == (row in planned.shallow_rows)
        ]
    components = pipeline.bundle.manifest.components
    work: dict[str, dict[str, float]] = {}
    for name, engine in pipeline.engines.items():
        if name not in rows or name not in timings.spans:
            continue
        path = pipeline.bundle.path / components[name].file
        counted = {
            (batch, pictures): count_work(
                path,
                dimensions={BATCH: batch, PICTURES: pictures},
                precision=engine.precision,
            )
            for batch, pictures in set(rows[name])
        }
        calls = [counted[call] for call in rows[name]]
        tiles = 1
        if name == "vae_decoder":
            tile = (int(side) for side in components[name].inputs[0].shape[2:])
            tiles = len(Tiling(*pipeline.latents_shape[1:], *tile).tiles)
        work[name] = {
            "flops": tiles * sum(call.flops for call in calls) / len(calls),
            "bytes": tiles * sum(call.bytes for call in calls) / len(calls),
            "calls": len(timings.spans[name]),
        }
    return work


def count_work(
    onnx_path: Path, *, dimensions: Mapping[str, int], precision: Precision | None = None
) -> Work:
    """The work of the graph at ``onnx_path``, its symbolic ``dimensions`` set, such as the batch.

    ``precision`` is what an engine stores float weights in; None: as the graph does. Weights of
    which rows are looked up count with the rows that are. `BundleError` where a shape that
    matters cannot be told.
    """
    onnx = import_package("onnx", extra="bench")
    model = onnx.load(str(onnx_path), load_external_data=False)
    graph = model.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in dimensions:
                dim.dim_value = dimensions[dim.dim_param]
    # The export's own shapes stay: inference knows no GroupNormalization. It fills the gaps.
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    tensors = {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else -1
            for dim in value.type.tensor_type.shape.dim
        )
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    }
    tensors |= {weight.name: tuple(weight.dims) for weight in graph.initializer}

    def shape(name: str) -> Shape:
        found = tensors.get(name, (-1,))
        if min(found, default=0) < 0:
            raise BundleError(
                f"{onnx_path}: the shape of {name!r} cannot be told",
                "Install a newer onnx, which infers more: pip install --upgrade onnx.",
            )
        return found

    flops = sum(_FLOPS[node.op_type](node, shape) for node in graph.node if node.op_type in _FLOPS)
    borders = sum(
        prod(shape(value.name)) * _item_bytes(value.type.tensor_type.elem_type)
        for value in (*graph.input, *graph.output)
    )
    looked_up = {
        node.input[0]: shape(node.output[0]) for node in graph.node if node.op_type == "Gather"
    }
    weights = sum(
        prod(looked_up.get(weight.name, tuple(weight.dims)))
        * _item_bytes(weight.data_type, precision)
        for weight in graph.initializer
    )
    return Work(flops=flops, bytes=borders + weights)


def _item_bytes(elem_type: int, precision: Precision | None = None) -> int:
    dtype = import_package("onnx", extra="bench").helper.tensor_dtype_to_np_dtype(elem_type)
    floating = dtype.kind == "f" or dtype.name == "bfloat16"  # which is no kind of numpy's own
    return ITEM_BYTES[precision] if precision and floating else int(dtype.itemsize)


def _conv(node: Any, shape: Callable[[str], Shape]) -> int:
    """Every output value is a sum over its group's input channels and the kernel."""
    return 2 * prod(shape(node.output[0])) * prod(shape(node.input[1])[1:])


def _conv_transpose(node: Any, shape: Callable[[str], Shape]) -> int:
    """Every input value goes to its group's output channels through the whole kernel."""
    return 2 * prod(shape(node.input[0])) * prod(shape(node.input[1])[1:])


def _matmul(node: Any, shape: Callable[[str], Shape]) -> int:
    return 2 * prod(shape(node.output[0])) * shape(node.input[0])[-1]


def _gemm(node: Any, shape: Callable[[str], Shape]) -> int:
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * prod(shape(node.output[0])) * shape(node.input[0])[0 if transposed else 1]


def _attention(node: Any, shape: Callable[[str], Shape]) -> int:
    """Queries times keys and weights times values; a causal mask saves nothing here.

    [batch, heads, tokens, d], or [batch, tokens, heads·d] with the heads as an attribute.
    """
    query, key, value = (shape(name) for name in node.input[:3])
    past = shape(node.input[4])[2] if len(node.input) > 4 and node.input[4] else 0
    tokens = key[-2] + past
    if len(query) == 4:
        return 2 * prod(query[:3]) * tokens * (query[3] + value[3])
    heads = {a.name: int(a.i) for a in node.attribute}
    group = heads["q_num_heads"] // heads["kv_num_heads"]
    return 2 * query[0] * query[1] * tokens * (query[2] + value[2] * group)


_FLOPS: Final[Mapping[str, Callable[[Any, Callable[[str], Shape]], int]]] = {
    "Attention": _attention,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
