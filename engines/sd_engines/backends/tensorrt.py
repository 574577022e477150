"""TensorRT and TensorRT-RTX: plans run on an NVIDIA GPU.

The two packages share nearly all of their API, so the module is a value here. A plan is executable
code: it is loaded only from a bundle whose hashes were checked, and host code in it is never
allowed.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.backends.cuda import Replay, named_stream, release
from sd_engines.backends.tensorrt_builder import build
from sd_engines.backends.tensorrt_package import (
    ANY_TARGET,
    compute_capability,
    failure,
    package,
    package_log,
)
from sd_engines.border import (
    check_arrays,
    check_batch,
    check_graph,
    closed_error,
    import_package,
    shape_at,
)
from sd_engines.closing import Closing, close_all
from sd_engines.errors import EngineMismatchError

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines.border import Rows
    from sd_engines.engine import Array
    from sd_engines.entries import ComponentEntry, EngineEntry

__all__ = ["TensorRtBinding", "TensorRtEngine", "build", "check", "load"]


def check(engine: EngineEntry, *, bundle_path: Path) -> None:
    """Whether the plan is of this version and this GPU.

    `EngineMismatchError` with the command that builds it anew; `BackendError` where the package or
    the GPU is missing.
    """
    found = package(engine.backend).__version__
    rebuild = f"sd-export build {bundle_path} --backend {engine.backend}"
    if found != engine.version:
        raise EngineMismatchError(
            f"{engine.file}: built by {engine.backend} {engine.version}, {found} is installed",
            rebuild,
        )
    here = f"sm{compute_capability()}"
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
    module = package(engine.backend)
    compute_capability()  # refuses where there is no GPU, in words
    xp = import_package("cupy", extra=engine.backend)
    log = package_log(module)
    log.errors.clear()
    runtime = module.Runtime(log)  # engine_host_code_allowed stays False
    plan = runtime.deserialize_cuda_engine(path.read_bytes())
    if plan is None:
        raise failure(f"{engine.backend} cannot load {path}", log)
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
        self._captures_itself = hasattr(module, "CudaGraphStrategy")
        self._runtime = runtime  # must outlive the plan
        self._plan = plan
        self._xp = xp
        self._max_batch = max_batch
        self._bindings: dict[Rows, TensorRtBinding] = {}
        self._calls: dict[Rows, TensorRtBinding] = {}
        self._lock = Lock()

    def bind(self, batch: int, *, pictures: int | None = None) -> TensorRtBinding:
        """Device buffers for ``batch`` rows of ``pictures``, zeroed; the same ones for the same."""
        check_batch(batch, self._max_batch, pictures=pictures)
        with self._lock:
            return self._binding((batch, pictures or batch), self._bindings)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run once on numpy or CuPy arrays, on CuPy's current stream; returns CuPy arrays.

        Threads that call share one stream.
        """
        rows = check_arrays(self.inputs, arrays, self._max_batch)
        with self._lock:
            binding = self._binding(rows, self._calls)
            for name, array in arrays.items():
                binding.inputs[name][...] = self._xp.asarray(array)
            binding.run()
            return {name: array.copy() for name, array in binding.outputs.items()}

    def _binding(self, rows: Rows, kept: dict[Rows, TensorRtBinding]) -> TensorRtBinding:
        if self._plan is None:
            raise closed_error()
        if rows not in kept:
            inputs, outputs = (
                {n: self._xp.zeros(shape_at(s, *rows), s.dtype) for n, s in specs.items()}
                for specs in (self.inputs, self.outputs)
            )
            log = package_log(self._module)
            context = self._context()
            if context is None:
                raise failure("no memory for the engine's activations", log)
            kept[rows] = TensorRtBinding(
                context, inputs, outputs, self._xp, log, captures_itself=self._captures_itself
            )
        return kept[rows]

    def _context(self) -> Any:
        """A new execution context: TensorRT-RTX's captures itself as a CUDA graph.

        It knows when: its kernels for the shapes in use are compiled at the first run, all of them,
        where else others would stand in for them meanwhile.
        """
        if not self._captures_itself:
            return self._plan.create_execution_context()
        module, config = self._module, self._plan.create_runtime_config()
        config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        config.dynamic_shapes_kernel_specialization_strategy = (
            module.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        return self._plan.create_execution_context(config)

    def close(self) -> None:
        """Free the plan, its contexts and buffers; twice is allowed."""
        with self._lock:
            close_all(self._bindings, self._calls)
            if self._plan is not None:
                self._plan = self._runtime = None
                release(self._xp)


class TensorRtBinding:
    """A `Binding`: one execution context tied to device buffers."""

    def __init__(
        self,
        context: Any,
        inputs: dict[str, Array],
        outputs: dict[str, Array],
        xp: Any,
        log: Any,
        *,
        captures_itself: bool,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._context = context
        self._xp = xp
        self._log = log
        for name, array in inputs.items():
            if not context.set_input_shape(name, array.shape):
                raise failure(f"the plan refuses shape {array.shape} of {name!r}", log)
        for name, array in (*inputs.items(), *outputs.items()):
            context.set_tensor_address(name, array.data.ptr)
        self._replay = None if captures_itself else Replay(self._enqueue, xp.cuda)

    def run(self) -> None:
        """Enqueue on CuPy's current stream, from ``inputs`` into ``outputs``."""
        if self._context is None:
            raise closed_error()
        stream = named_stream(self._xp.cuda)
        if self._replay is None:
            self._enqueue(stream.ptr)
        else:
            self._replay.run(stream)

    def _enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise failure("the plan could not be run", self._log)

    def close(self) -> None:
        """Let go of the context once the device is done with it; the buffers stay the caller's."""
        if self._context is not None:
            self._xp.cuda.Device().synchronize()
            self._replay = self._context = None
