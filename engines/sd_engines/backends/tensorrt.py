"""TensorRT and TensorRT-RTX: plans built from a bundle's ONNX, run on an NVIDIA GPU.

The two packages share nearly all of their API, so the module is a value here. Networks are
strongly typed: precision is that of the graph. TensorRT-RTX builds where there is no GPU; TensorRT
needs the GPU that will run the plan; both need it to run. A plan is executable code: it is loaded
only from a bundle whose hashes were checked, and host code in it is never allowed.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.border import (
    check_arrays,
    check_batch,
    check_graph,
    closed_error,
    import_package,
    shape_at,
)
from sd_engines.bundle import engine_key, hash_files
from sd_engines.closing import Closing
from sd_engines.errors import BackendError, ConfigError, EngineMismatchError
from sd_engines.manifest import EngineEntry
from sd_engines.spec import BATCH

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines.engine import Array, Progress
    from sd_engines.manifest import ComponentEntry
    from sd_engines.spec import Precision, Profile

logger = logging.getLogger(__name__)

ANY_TARGET = "any"
"""The target of a TensorRT-RTX plan made for every GPU that its version supports."""
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_NO_GPU_HINT = (
    "Run it on a machine with an NVIDIA GPU and its driver (nvidia-smi shows both), or name a "
    "backend that runs here: --backend onnxruntime"
)


def build(
    onnx_path: Path,
    *,
    output_dir: Path,
    backend: str,
    component: str,
    entry: ComponentEntry,
    profile: Profile,
    precision: Precision | None = None,
    target: str | None = None,
    progress: Progress | None = None,
    workspace_bytes: int | None = None,
    timing_cache: Path | None = None,
) -> EngineEntry:
    """Build ``output_dir/engines/<backend>-<version>-<target>/<component>.engine``.

    ``target``: for TensorRT-RTX ``any`` (default) or compute capabilities such as ``sm120`` or
    ``sm86+sm89``; for TensorRT the GPU of this machine. The batch axis takes 1 to the profile's
    largest, tuned for the largest. ``timing_cache`` is read and written back, so that TensorRT's
    next build measures less. `ConfigError` for a precision the graph has not or a target the
    package does not know; `BackendError` with the parser's or builder's own words where it fails.
    """
    module = _package(backend)
    if precision not in (None, entry.precision):
        raise ConfigError(
            f"{backend} computes in the precision of the graph, {entry.precision}, not {precision}",
            f"Export with --precision {precision}.",
        )
    log = _log(module)
    log.errors.clear()
    if backend == "tensorrt":
        here = f"sm{_compute_capability()}"
        if target not in (None, here):
            raise ConfigError(f"TensorRT builds for this GPU only, {here}", f"Build on a {target}.")
        target = here
    target = target or ANY_TARGET
    builder = module.Builder(log)
    network = _parse(module, builder, onnx_path, log)
    config = builder.create_builder_config()
    config.clear_flag(module.BuilderFlag.TF32)  # on by default: fp32 would be 10 bits of mantissa
    if workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, workspace_bytes)
    if target != ANY_TARGET and backend == "tensorrt-rtx":
        _set_compute_capabilities(module, config, target)
    shapes = builder.create_optimization_profile()
    max_batch = profile.max_batch(component)
    for spec in entry.inputs:
        if BATCH in spec.shape:
            largest = shape_at(spec, max_batch)
            shapes.set_shape(spec.name, shape_at(spec, 1), largest, largest)
    if config.add_optimization_profile(shapes) < 0:
        raise _failure(f"{backend} refuses the profile of {component}", log)
    timings = None
    if timing_cache is not None and backend == "tensorrt":  # TensorRT-RTX measures nothing
        known = timing_cache.read_bytes() if timing_cache.is_file() else b""
        timings = config.create_timing_cache(known)
        config.set_timing_cache(timings, False)
    config.progress_monitor = monitor = _monitor(module, progress)
    plan = builder.build_serialized_network(network, config)
    if monitor.stopped_by is not None:
        raise monitor.stopped_by
    if plan is None:
        raise _failure(f"{backend} cannot build {component}", log)
    if timing_cache is not None and timings is not None:
        timing_cache.write_bytes(memoryview(timings.serialize()))

    file = f"engines/{backend}-{module.__version__}-{target}/{component}.engine"
    path = output_dir / file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(memoryview(plan))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise BackendError(
            f"{path}: {error}", "Make room on the disk, then run it again."
        ) from error
    built = hash_files(output_dir, [file])[file]
    flags = {"tf32": "off", "workspace_bytes": str(workspace_bytes or "all")}
    return EngineEntry(
        component=component,
        backend=backend,
        version=module.__version__,
        target=target,
        precision=entry.precision,
        file=file,
        sha256=built.sha256,
        bytes=built.bytes,
        flags=flags,
        key=engine_key(
            (onnx.sha256 for onnx in entry.files.values()),
            profile=profile,
            precision=entry.precision,
            backend=backend,
            version=module.__version__,
            target=target,
            flags=flags,
        ),
    )


def _parse(module: Any, builder: Any, onnx_path: Path, log: Any) -> Any:
    strongly_typed = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = module.OnnxParser(network, log)
    if not parser.parse_from_file(os.fspath(onnx_path)):  # a path: it finds the external data
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        words = [f"{e.node_operator()} {e.node_name()}: {e.desc()}".lstrip(" :") for e in errors]
        raise _failure(f"{module.__name__} cannot parse {onnx_path}", log, words)
    _let_attention_decompose(module, network)
    return network


def _let_attention_decompose(module: Any, network: Any) -> None:
    """Where no fused kernel takes an Attention (fp32, small heads), let it be its parts.

    Without leave to do so the builder fails; with it, it still takes a fused kernel where one fits.
    """
    attention = getattr(module.LayerType, "ATTENTION_INPUT", None)
    for layer in map(network.get_layer, range(network.num_layers)):
        if attention is not None and layer.type == attention:
            layer.__class__ = module.IAttentionInputLayer  # the bindings' way to cast a layer
            layer.attention.decomposable = True


def _set_compute_capabilities(module: Any, config: Any, target: str) -> None:
    known = {
        name.lower(): value
        for name, value in module.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    names = target.split("+")
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"{module.__name__} {module.__version__} does not build for {unknown[0]!r}",
            f"Known: {ANY_TARGET}, {', '.join(known)}; join several with '+'.",
        )
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(known[name], index)


def check(engine: EngineEntry, *, bundle_path: Path) -> None:
    """Whether the plan is of this version and this GPU.

    `EngineMismatchError` with the command that builds it anew; `BackendError` where the package or
    the GPU is missing.
    """
    found = _package(engine.backend).__version__
    rebuild = f"sd-export build {bundle_path} --backend {engine.backend}"
    if found != engine.version:
        raise EngineMismatchError(
            f"{engine.file}: built by {engine.backend} {engine.version}, {found} is installed",
            rebuild,
        )
    here = f"sm{_compute_capability()}"
    if engine.target != ANY_TARGET and here not in engine.target.split("+"):
        raise EngineMismatchError(
            f"{engine.file}: built for {engine.target}, this GPU is {here}", rebuild
        )


def load(
    path: Path,
    *,
    component: ComponentEntry,
    engine: EngineEntry,
    max_batch: int,
    threads: int | None = None,
) -> TensorRtEngine:
    """Deserialise the plan at ``path`` onto the current GPU; ``threads`` means nothing to it."""
    module = _package(engine.backend)
    _compute_capability()  # refuses where there is no GPU, in words
    xp = import_package("cupy", extra=engine.backend)
    log = _log(module)
    log.errors.clear()
    runtime = module.Runtime(log)  # engine_host_code_allowed stays False
    plan = runtime.deserialize_cuda_engine(path.read_bytes())
    if plan is None:
        raise _failure(f"{engine.backend} cannot load {path}", log)
    return TensorRtEngine(
        module, runtime, plan, xp, component=component, engine=engine, max_batch=max_batch
    )


class TensorRtEngine(Closing):
    """An `Engine` over one plan; buffers are CuPy arrays, calls are enqueued, not waited for."""

    def __init__(
        self,
        module: Any,
        runtime: Any,
        plan: Any,
        xp: Any,
        *,
        component: ComponentEntry,
        engine: EngineEntry,
        max_batch: int,
    ) -> None:
        self.entry = engine
        self.inputs = {spec.name: spec for spec in component.inputs}
        self.outputs = {spec.name: spec for spec in component.outputs}
        names = [plan.get_tensor_name(i) for i in range(plan.num_io_tensors)]
        for kind, specs, mode in (
            ("inputs", self.inputs, module.TensorIOMode.INPUT),
            ("outputs", self.outputs, module.TensorIOMode.OUTPUT),
        ):
            found = (
                (
                    n,
                    np.dtype(module.nptype(plan.get_tensor_dtype(n))).name,
                    len(plan.get_tensor_shape(n)),
                )
                for n in names
                if plan.get_tensor_mode(n) == mode
            )
            check_graph(kind, specs, found)
        self._module = module
        self._runtime = runtime  # must outlive the plan
        self._plan = plan
        self._xp = xp
        self._max_batch = max_batch
        self._bindings: dict[int, TensorRtBinding] = {}
        self._calls: dict[int, TensorRtBinding] = {}
        self._lock = Lock()

    def bind(self, batch: int) -> TensorRtBinding:
        """Device buffers for ``batch`` rows, zeroed; the same ones for the same ``batch``."""
        check_batch(batch, self._max_batch)
        with self._lock:
            return self._binding(batch, self._bindings)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run once on numpy or CuPy arrays, on CuPy's current stream; returns CuPy arrays.

        Threads that call share one stream.
        """
        batch = check_arrays(self.inputs, arrays, self._max_batch)
        with self._lock:
            binding = self._binding(batch, self._calls)
            for name, array in arrays.items():
                binding.inputs[name][...] = self._xp.asarray(array)
            binding.run()
            return {name: array.copy() for name, array in binding.outputs.items()}

    def _binding(self, batch: int, kept: dict[int, TensorRtBinding]) -> TensorRtBinding:
        if self._plan is None:
            raise closed_error()
        if batch not in kept:
            inputs, outputs = (
                {n: self._xp.zeros(shape_at(s, batch), s.dtype) for n, s in specs.items()}
                for specs in (self.inputs, self.outputs)
            )
            log = _log(self._module)
            context = self._plan.create_execution_context()
            if context is None:
                raise _failure("no memory for the engine's activations", log)
            kept[batch] = TensorRtBinding(context, inputs, outputs, self._xp, log)
        return kept[batch]

    def close(self) -> None:
        """Free the plan, its contexts and buffers; twice is allowed."""
        with self._lock:
            for binding in (*self._bindings.values(), *self._calls.values()):
                binding.close()
            self._bindings.clear()
            self._calls.clear()
            self._plan = self._runtime = None


class TensorRtBinding:
    """A `Binding`: one execution context tied to device buffers."""

    def __init__(
        self, context: Any, inputs: dict[str, Array], outputs: dict[str, Array], xp: Any, log: Any
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._context = context
        self._xp = xp
        self._log = log
        for name, array in inputs.items():
            if not context.set_input_shape(name, array.shape):
                raise _failure(f"the plan refuses shape {array.shape} of {name!r}", log)
        for name, array in (*inputs.items(), *outputs.items()):
            context.set_tensor_address(name, array.data.ptr)

    def run(self) -> None:
        """Enqueue on CuPy's current stream, from ``inputs`` into ``outputs``."""
        if self._context is None:
            raise closed_error()
        if not self._context.execute_async_v3(self._xp.cuda.get_current_stream().ptr):
            raise _failure("the plan could not be run", self._log)

    def close(self) -> None:
        """Let go of the context once the device is done with it; the buffers stay the caller's."""
        if self._context is not None:
            self._xp.cuda.Device().synchronize()
            self._context = None


def _package(backend: str) -> Any:
    return import_package(_MODULES[backend], extra=backend)


def _compute_capability() -> int:
    """Of this process's first GPU, such as 89; `BackendError` where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError("there is no NVIDIA driver on this machine", _NO_GPU_HINT) from error
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        raise BackendError("the NVIDIA driver finds no GPU", _NO_GPU_HINT)
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
    return major.value * 10 + minor.value


def _failure(what: str, log: Any, words: list[str] | None = None) -> BackendError:
    """What failed, in the package's own words: the parser's, else the last that it logged."""
    said = (words or log.errors[-3:])[:5]
    text = "; ".join([what, *said]) if said else what
    if "out of memory" in text.lower() or "OutOfMemory" in text:
        return BackendError(text, "Free memory on the GPU, or make a bundle of smaller pictures.")
    return BackendError(
        text, "Name another backend, or another --precision or opset, and report it."
    )


@cache
def _log(module: Any) -> Any:
    """The one logger of ``module``: it keeps the first it is given for the whole process."""

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.min_severity = module.Logger.Severity.WARNING
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(module.Logger.Severity.ERROR):
                self.errors.append(message)
            logger.debug("%s: %s", module.__name__, message)

    return Log()


def _monitor(module: Any, progress: Progress | None) -> Any:
    """Progress of a build; what ``progress`` raises, KeyboardInterrupt too, stops the build."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped_by: BaseException | None = None

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self.steps[name] = num_steps
            self.report(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self.report(name, step + 1)
            return self.stopped_by is None

        def phase_finish(self, name: str) -> None:
            self.report(name, self.steps.get(name, 1))

        def report(self, name: str, done: int) -> None:
            try:
                if progress is not None and self.stopped_by is None:
                    progress(name, done, max(self.steps.get(name, 1), 1))
            except BaseException as error:  # it must not pass through the builder's own frames
                self.stopped_by = error

    return Monitor()
