"""What this machine reaches at its best, in the run that is measured: products and copies.

A component's share of these says how much is left to gain. The matrix product runs through the
backend, threads and precision that the component runs in; in float32 numpy tries as well, so that a
backend's own weakness does not pass for the machine's. The best repetition counts: other programs
only take away.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sd_engines.border import import_package
from sd_engines.bundle import hash_files
from sd_engines.cores import usable_cores
from sd_engines.engine import build_engine, load_engine
from sd_engines.entries import ComponentEntry
from sd_engines.errors import BackendError
from sd_engines.spec import BATCH, GRAPH_PRECISIONS, LOSSY, Profile, TensorSpec
from sd_runtime.arrays import copy_into, to_host
from sd_runtime.timing import clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from sd_engines.engine import Engine
    from sd_engines.entries import EngineEntry

logger = logging.getLogger(__name__)

COPY_BYTES: Final = 256 << 20
"""Of one array: many times what a processor's last cache holds."""
COPY_BYTES_GPU: Final = 2 << 30
"""Long enough for a GPU that launching and waiting do not count."""
PRODUCT_SIZE: Final = 2048
"""Rows and columns: long enough to reach the peak, 17 GFLOP."""
PRODUCT_SIZE_GPU: Final = 8192
_OPSET: Final = 20
_BUDGET_S: Final = 1.5
_FEWEST_RUNS: Final = 3


def measure_ceilings(engines: Iterable[EngineEntry], *, threads: int | None) -> dict[str, float]:
    """The ceilings of a pipeline on ``engines``, as `Measurement.ceilings` names them.

    One product for each precision among them. ``threads`` None: every core this process may use.
    Copies are made where the first of them runs. Takes some seconds and half a GiB, or four of a
    GPU's. A product that does not run is logged and left out: latencies are worth more than it.
    """
    ceilings: dict[str, float] = {}
    everything = threads in (None, usable_cores())
    for precision, engine in {engine.precision: engine for engine in engines}.items():
        on_cpu = engine.target == "cpu"
        size = PRODUCT_SIZE if on_cpu else PRODUCT_SIZE_GPU
        try:
            flops = backend_product_flops(engine, size=size, threads=threads)
        except BackendError as error:
            logger.warning("no ceiling in %s: %s", precision, error.message)
            continue
        if on_cpu and precision == "fp32" and everything:
            flops = max(flops, numpy_product_flops(size=size))
        ceilings[f"matmul_{precision}_flops"] = flops
        if "copy_bytes_per_s" not in ceilings:
            ceilings["copy_bytes_per_s"] = (
                copy_bytes_per_s(num_bytes=COPY_BYTES, threads=threads)
                if on_cpu
                else gpu_copy_bytes_per_s()
            )
    return ceilings


def copy_bytes_per_s(*, num_bytes: int, threads: int | None) -> float:
    """Bytes read plus bytes written a second by plain copies, one slice a thread, as in STREAM."""
    threads = threads or usable_cores()
    source = np.ones(num_bytes, np.uint8)
    target = np.zeros_like(source)
    pairs = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        return 2 * num_bytes / _best_s(lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs)))


def gpu_copy_bytes_per_s() -> float:
    """Bytes read plus bytes written a second by a copy on the GPU."""
    cupy = import_package("cupy", extra="cuda")
    source = cupy.ones(COPY_BYTES_GPU, cupy.uint8)
    target = cupy.empty_like(source)

    def run() -> None:
        cupy.copyto(target, source)
        cupy.cuda.get_current_stream().synchronize()

    return 2 * COPY_BYTES_GPU / _best_s(run)


def numpy_product_flops(*, size: int) -> float:
    """FLOP/s of numpy's float32 matrix product on every core this process may use."""
    a, b = _random(size, size), _random(size, size)
    out = np.empty_like(a)
    # A BLAS that was told to use one thread, by OMP_NUM_THREADS say, gets one call for each core.
    blocks = [slice(rows[0], rows[-1] + 1) for rows in np.array_split(range(size), usable_cores())]
    with ThreadPoolExecutor(len(blocks)) as pool:
        return (
            2
            * size**3
            / _best_s(
                lambda: list(pool.map(lambda rows: np.matmul(a[rows], b, out=out[rows]), blocks))
            )
        )


def backend_product_flops(engine: EngineEntry, *, size: int, threads: int | None) -> float:
    """FLOP/s of a product with a constant matrix in the backend and precision of ``engine``."""
    with TemporaryDirectory() as folder, _product(engine, size, threads, Path(folder)) as product:
        binding = product.bind(1)
        copy_into(binding.inputs["a"], _random(1, size, size))

        def run() -> None:
            binding.run()
            to_host(binding.outputs["product"][0, 0, :1])  # waits for a GPU

        return 2 * size**3 / _best_s(run)


def _product(engine: EngineEntry, size: int, threads: int | None, folder: Path) -> Engine:
    """An engine as ``engine`` is, of one matrix product."""
    # OpenVINO is told its precision; the others find it in the graph, but for tf32; 8 bits all do.
    told = engine.precision if engine.precision not in LOSSY else "fp32"
    in_graph = engine.precision in GRAPH_PRECISIONS and engine.backend != "openvino"
    precision = engine.precision if in_graph else "fp32"
    path = folder / "product.onnx"
    if engine.precision in LOSSY:
        _write_8_bit_product(path, size, engine.precision)
    else:
        _write_product(path, size, precision)
    border = (BATCH, size, size)
    entry = ComponentEntry(
        file=path.name,
        files=hash_files(folder, [path.name]),
        precision=precision,
        opset=_OPSET,
        inputs=(TensorSpec("a", "float32", border),),
        outputs=(TensorSpec("product", "float32", border),),
    )
    profile = Profile(batch_size=1, height=size, width=size, vae_scale_factor=1)
    built = build_engine(
        engine.backend,
        path,
        output_dir=folder,
        component="product",
        entry=entry,
        profile=profile,
        precision=told,
        target=engine.target,
    )
    return load_engine(
        folder / built.file, component=entry, engine=built, max_batch=1, threads=threads
    )


def _write_product(path: Path, size: int, precision: str) -> None:
    """``product = a · b`` for float32 [batch, size, size], computed in ``precision``."""
    onnx = import_package("onnx", extra="bench")
    helper, types = onnx.helper, onnx.TensorProto
    inner = {"fp32": types.FLOAT, "fp16": types.FLOAT16, "bf16": types.BFLOAT16}[precision]
    weights = _random(size, size).astype(helper.tensor_dtype_to_np_dtype(inner))
    nodes = [
        helper.make_node("Cast", ["a"], ["x"], to=inner),
        helper.make_node("MatMul", ["x", "b"], ["y"]),
        helper.make_node("Cast", ["y"], ["product"], to=types.FLOAT),
    ]
    constants = [helper.make_tensor("b", inner, weights.shape, weights.tobytes(), raw=True)]
    _write_graph(path, size, nodes, constants)


def _write_8_bit_product(path: Path, size: int, precision: str) -> None:
    """The same with ``a`` and ``b`` in 8 bits, as backends find it in a quantised graph."""
    onnx = import_package("onnx", extra="bench")
    helper, types = onnx.helper, onnx.TensorProto
    inner = {"int8": types.INT8, "fp8": types.FLOAT8E4M3FN}[precision]
    scale = 1 / 32
    weights = np.clip(_random(size, size) / scale, -127, 127)
    weights = weights.astype(helper.tensor_dtype_to_np_dtype(inner))
    nodes = [
        helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["a8"]),
        helper.make_node("DequantizeLinear", ["a8", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["b", "scale", "zero"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["product"]),
    ]
    constants = [
        helper.make_tensor("b", inner, weights.shape, weights.tobytes(), raw=True),
        helper.make_tensor("scale", types.FLOAT, [], [scale]),
        helper.make_tensor("zero", inner, [], bytes(1), raw=True),
    ]
    _write_graph(path, size, nodes, constants)


def _write_graph(path: Path, size: int, nodes: list[Any], constants: list[Any]) -> None:
    """Write ``nodes`` as the graph that makes ``product`` of ``a``."""
    onnx = import_package("onnx", extra="bench")
    helper, border = onnx.helper, (onnx.TensorProto.FLOAT, [BATCH, size, size])
    inputs, outputs = ([helper.make_tensor_value_info(name, *border)] for name in ("a", "product"))
    graph = helper.make_graph(nodes, "product", inputs, outputs, constants)
    opset = helper.make_opsetid("", _OPSET)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


def _random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _best_s(run: Callable[[], Any]) -> float:
    """The shortest of as many runs as fit into the budget, after one that is not counted."""
    run()
    durations: list[float] = []
    while len(durations) < _FEWEST_RUNS or sum(durations) < _BUDGET_S:
        began = clock()
        run()
        durations.append(clock() - began)
    return min(durations)
