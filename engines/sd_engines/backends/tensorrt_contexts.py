"""The execution contexts of a plan, which work in memory that is given to them.

TensorRT-RTX's capture themselves as CUDA graphs. It compiles a plan's kernels for the GPU at hand
when they are first run, so what it compiled is kept for the next process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_engines.backends.cuda import compute_capability
from sd_engines.cache import cached_file, read_cached, write_cached

if TYPE_CHECKING:
    from sd_engines.entries import EngineEntry


class Contexts:
    """Makes contexts of ``plan``, which was deserialised from ``engine``."""

    def __init__(self, module: Any, plan: Any, engine: EngineEntry) -> None:
        self._plan: Any = plan
        self._config: Any = None
        self._kernels: Any = None
        self._memory = module.ExecutionContextAllocationStrategy.USER_MANAGED
        self.capture_themselves = hasattr(module, "CudaGraphStrategy")
        if not self.capture_themselves:
            return
        self._config = plan.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(self._memory)
        self._config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # all kernels for the shapes in use at the first run, where else others would stand in
        self._config.dynamic_shapes_kernel_specialization_strategy = (
            module.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        gpu = f"{engine.backend}-{engine.version}-sm{compute_capability()}"
        self._remembered = cached_file(f"{gpu}-{engine.key[:32]}.kernels")
        self._kernels = self._config.create_runtime_cache()
        self._known = read_cached(self._remembered)
        if self._known:  # those of another GPU or driver are refused, and compiled anew
            self._kernels.deserialize(self._known)
        self._config.set_runtime_cache(self._kernels)

    def new(self) -> Any:
        """One more, or None where there is no memory for it."""
        how = self._config if self.capture_themselves else self._memory
        return self._plan.create_execution_context(how)

    def keep_kernels(self) -> None:
        """Keep what was compiled since; call it after the first run of a shape."""
        if not self.capture_themselves:
            return
        kernels = bytes(memoryview(self._kernels.serialize()))
        if kernels != self._known:
            self._known = kernels
            write_cached(self._remembered, kernels)

    def close(self) -> None:
        """Let go of the plan, once no context is left."""
        self._config = self._kernels = self._plan = None
