"""TensorRT and TensorRT-RTX: plans run on an NVIDIA GPU.

The two packages share nearly all of their API, so the module is a value here. A plan is executable
code: it is loaded only from a bundle whose hashes were checked, and host code in it is never
allowed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.backends.bound import BoundEngine
from sd_engines.backends.cuda import Replay, compute_capability, named_stream, release
from sd_engines.backends.tensorrt_builder import build
from sd_engines.backends.tensorrt_package import (
    ANY_TARGET,
    failure,
    package,
    package_log,
)
from sd_engines.border import closed_error, import_package
from sd_engines.build_command import build_command
from sd_engines.errors import EngineMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sd_engines.border import Rows
    from sd_engines.engine import Array
    from sd_engines.entries import ComponentEntry, EngineEntry

__all__ = ["TensorRtBinding", "TensorRtEngine", "build", "check", "default_target", "load"]


def default_target(backend: str) -> str:
    """What an engine is for where nobody says: TensorRT's for this GPU, or `BackendError`."""
    return ANY_TARGET if backend == "tensorrt-rtx" else f"sm{compute_capability()}"


def check(engine: EngineEntry, *, bundle_path: Path) -> None:
    """Whether the plan is of this version and this GPU.

    `EngineMismatchError` with the command that builds it anew; `BackendError` where the package or
    the GPU is missing.
    """
    found = package(engine.backend).__version__
    if found != engine.version:
        raise EngineMismatchError(
            f"{engine.file}: built by {engine.backend} {engine.version}, {found} is installed",
            build_command(bundle_path, engine),
        )
    here = f"sm{compute_capability()}"
    if engine.target != ANY_TARGET and here not in engine.target.split("+"):
        raise EngineMismatchError(
            f"{engine.file}: built for {engine.target}, this GPU is {here}",
            build_command(bundle_path, replace(engine, target=ANY_TARGET)),
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


class TensorRtEngine(BoundEngine):
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
        super().__init__(
            component=component,
            engine=engine,
            max_batch=max_batch,
            xp=xp,
            inputs=_tensors(module, plan, module.TensorIOMode.INPUT),
            outputs=_tensors(module, plan, module.TensorIOMode.OUTPUT),
        )
        self._module = module
        self._captures_itself = hasattr(module, "CudaGraphStrategy")
        self._runtime = runtime  # must outlive the plan
        self._plan = plan

    def _new_binding(
        self, rows: Rows, inputs: dict[str, Array], outputs: dict[str, Array]
    ) -> TensorRtBinding:
        log = package_log(self._module)
        log.errors.clear()
        context = self._context()
        if context is None:
            raise failure("no memory for the engine's activations", log)
        return TensorRtBinding(
            context, inputs, outputs, self._xp, log, captures_itself=self._captures_itself
        )

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

    def _release(self) -> None:
        self._plan = self._runtime = None
        release(self._xp)


def _tensors(module: Any, plan: Any, mode: Any) -> Iterator[tuple[str, str, int]]:
    for index in range(plan.num_io_tensors):
        name = plan.get_tensor_name(index)
        if plan.get_tensor_mode(name) == mode:
            dtype = np.dtype(module.nptype(plan.get_tensor_dtype(name)))
            yield name, dtype.name, len(plan.get_tensor_shape(name))


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
            if not context.set_tensor_address(name, array.data.ptr):
                raise failure(f"the plan refuses the memory of {name!r}", log)
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
        self._log.errors.clear()
        if not self._context.execute_async_v3(stream):
            raise failure("the plan could not be run", self._log)

    def close(self) -> None:
        """Let go of the context once the device is done with it; the buffers stay the caller's."""
        if self._context is not None:
            self._xp.cuda.Device().synchronize()
            self._replay = self._context = None
