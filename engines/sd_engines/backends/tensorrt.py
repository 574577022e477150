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
from sd_engines.backends.cuda import Replay, named_stream, release, this_gpu, workspace_of
from sd_engines.backends.tensorrt_builder import build
from sd_engines.backends.tensorrt_contexts import Contexts
from sd_engines.backends.tensorrt_package import failure, package, package_log
from sd_engines.backends.tensorrt_target import ANY_TARGET, default_target, is_for, target_of
from sd_engines.border import closed_error, import_package
from sd_engines.build_command import build_command
from sd_engines.errors import EngineMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sd_engines.backends.cuda import Workspace
    from sd_engines.border import Rows
    from sd_engines.engine import Array
    from sd_engines.entries import ComponentEntry, EngineEntry

__all__ = ["TensorRtBinding", "TensorRtEngine", "build", "check", "default_target", "load"]


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
    gpu = this_gpu()
    if not is_for(engine.target, gpu):
        raise EngineMismatchError(
            f"{engine.file}: built for {engine.target}, this GPU is {target_of(gpu)}",
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
    here = f"SM{this_gpu().capability}"  # refuses where there is no GPU, in words
    xp = import_package("cupy", extra=engine.backend)
    log = package_log(module)
    log.errors.clear()
    runtime = module.Runtime(log)  # engine_host_code_allowed stays False
    plan = runtime.deserialize_cuda_engine(path.read_bytes())
    if plan is None:
        raise failure(f"{engine.backend} cannot load {path}{_unlisted(module, here)}", log)
    return TensorRtEngine(
        module, runtime, plan, xp, component=component, engine=engine, max_batch=max_batch
    )


def _unlisted(module: Any, gpu: str) -> str:
    """What more there is to say of a ``gpu`` that TensorRT-RTX does not list; it may run yet."""
    listed = getattr(module, "ComputeCapability", None)
    known = [name for name in getattr(listed, "__members__", ()) if name.startswith("SM")]
    if gpu in known or not known:
        return ""
    return f", which lists {', '.join(known)}; this GPU is {gpu}"


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
        self._runtime = runtime  # must outlive the plan
        self._contexts = Contexts(module, plan, engine)

    def _new_binding(
        self, rows: Rows, inputs: dict[str, Array], outputs: dict[str, Array]
    ) -> TensorRtBinding:
        log = package_log(self._module)
        log.errors.clear()
        context = self._contexts.new()
        if context is None:
            raise failure("no memory for an execution context", log)
        return TensorRtBinding(
            context, inputs, outputs, self._xp.cuda, log, contexts=self._contexts
        )

    def _release(self) -> None:
        self._contexts.close()
        self._runtime = None
        release(self._xp)


def _tensors(module: Any, plan: Any, mode: Any) -> Iterator[tuple[str, str, int]]:
    for index in range(plan.num_io_tensors):
        name = plan.get_tensor_name(index)
        if plan.get_tensor_mode(name) == mode:
            dtype = np.dtype(module.nptype(plan.get_tensor_dtype(name)))
            yield name, dtype.name, len(plan.get_tensor_shape(name))


class TensorRtBinding:
    """A `Binding`: one execution context tied to device buffers.

    It works in the memory of the stream that it runs on, which is all engines' that run there.
    """

    def __init__(
        self,
        context: Any,
        inputs: dict[str, Array],
        outputs: dict[str, Array],
        cuda: Any,
        log: Any,
        *,
        contexts: Contexts,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._context = context
        self._contexts = contexts
        self._cuda = cuda
        self._log = log
        for name, array in inputs.items():
            if not context.set_input_shape(name, array.shape):
                raise failure(f"the plan refuses shape {array.shape} of {name!r}", log)
        for name, array in (*inputs.items(), *outputs.items()):
            if not context.set_tensor_address(name, array.data.ptr):
                raise failure(f"the plan refuses the memory of {name!r}", log)
        self._bytes = context.update_device_memory_size_for_shapes()
        self._workspace = workspace_of(named_stream(cuda))
        self._workspace.reserve(self._bytes, cuda)
        self._memory: Any = None
        self._replay: Replay | None = None

    def run(self) -> None:
        """Enqueue on CuPy's current stream, from ``inputs`` into ``outputs``."""
        if self._context is None:
            raise closed_error()
        stream = named_stream(self._cuda)
        workspace = workspace_of(stream)
        is_first = self._memory is None
        if is_first or workspace is not self._workspace:
            self._work_in(workspace)
        if self._replay is None:
            self._enqueue(stream.ptr)
        else:
            self._replay.run(stream)
        if is_first:
            self._contexts.keep_kernels()

    def _work_in(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._memory = workspace.reserve(self._bytes, self._cuda)
        self._context.set_device_memory(self._memory.ptr, self._bytes)
        if not self._contexts.capture_themselves:
            self._replay = Replay(self._enqueue, self._cuda)

    def _enqueue(self, stream: int) -> None:
        self._log.errors.clear()
        if not self._context.execute_async_v3(stream):
            raise failure("the plan could not be run", self._log)

    def close(self) -> None:
        """Let go of the context once the device is done with it; the buffers stay the caller's."""
        if self._context is not None:
            self._cuda.Device().synchronize()
            self._replay = self._context = self._memory = None
            del self._workspace
