"""ONNX Runtime: any ONNX of a bundle on the CPU, or on an NVIDIA GPU with onnxruntime-gpu.

Inputs and outputs are bound once per batch to fixed memory, so a run allocates nothing.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sd_engines.backends.bound import BoundEngine
from sd_engines.backends.cuda import compute_capability, named_stream, release
from sd_engines.backends.onnxruntime_binding import CudaBinding, OnnxRuntimeBinding
from sd_engines.backends.onnxruntime_package import PROVIDERS, package
from sd_engines.border import MEMORY_HINT, computed_in, import_package
from sd_engines.bundle import portable_entry
from sd_engines.cores import usable_cores
from sd_engines.errors import BackendError
from sd_engines.files import is_utf8

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from sd_engines.border import Rows
    from sd_engines.engine import Array, Progress
    from sd_engines.entries import ComponentEntry, EngineEntry
    from sd_engines.spec import Precision, Profile

logger = logging.getLogger(__name__)

BACKEND = "onnxruntime"
LEAN: Final = {"memory": "lean"}
"""`EngineEntry.flags` of an engine that runs a few times only: it maps its weights, widens each
when it is used, and gives all memory back after a run. 1.4 times as slow, at 0.4 of the memory."""
_WIDENING = ("ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer")
_DTYPES = {
    "tensor(bool)": "bool",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
}


def default_target(_backend: str) -> str:
    """What an engine is for where nobody says."""
    return "cpu"


def build(
    onnx_path: Path,
    *,
    output_dir: Path,
    backend: str = BACKEND,
    component: str,
    entry: ComponentEntry,
    profile: Profile,
    precision: Precision | None = None,
    target: str | None = None,
    progress: Progress | None = None,
) -> EngineEntry:
    """The engine entry of ``onnx_path``, which ONNX Runtime runs as it is: nothing is written.

    ``target`` is ``cpu`` (default) or ``cuda``. ``precision`` is that of the graph, or tf32 of an
    fp32 one on a GPU; asking for another is a `ConfigError`.
    """
    target = target or "cpu"
    version = package(target).__version__
    found = computed_in(entry.precision, precision, backend=BACKEND, on_gpu=target != "cpu")
    return portable_entry(
        component, entry, profile, BACKEND, version=version, target=target, precision=found
    )


def check(engine: EngineEntry, *, bundle_path: Path) -> None:
    """`BackendError` where the package, its provider or the GPU of the engine is not here."""
    package(engine.target)
    if engine.target == "cuda":
        compute_capability()


def load(
    path: Path,
    *,
    component: ComponentEntry,
    engine: EngineEntry,
    max_batch: int,
    threads: int | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> OnnxRuntimeEngine:
    """Open the ONNX at ``path``; ``threads`` None: every core this process may use.

    ``weights`` take the place of its initializers. `BackendError` where the package, the provider
    or memory is missing.
    """
    if not is_utf8(path):
        raise BackendError(
            f"ONNX Runtime opens no file with a path that is not UTF-8: {path}",
            "Rename the folder, or name another backend.",
        )
    target = engine.target
    module = package(target)
    lean = engine.flags == LEAN
    options = _options(module, threads=threads or usable_cores(), lean=lean)
    values = [module.OrtValue.ortvalue_from_numpy(array) for array in (weights or {}).values()]
    if weights:  # `add_initializer` would come after optimizers that have read the old ones
        options.add_external_initializers([*weights], values)
    providers: list[Any] = [PROVIDERS[target]]
    stream = None
    if target == "cuda":
        stream = named_stream(import_package("cupy", extra="cuda").cuda)
        settings = {
            "user_compute_stream": str(stream.ptr),
            "use_tf32": str(int(engine.precision == "tf32")),  # on by default
        }
        # As a CUDA graph a run is one launch; refused where any node of the graph stays on the CPU.
        captured = settings | {"enable_cuda_graph": "1"}
        providers = [(PROVIDERS[target], each) for each in (captured, settings)]
    session = _session(module, path, options, providers, _WIDENING if lean else ())
    if session.get_providers()[0] != PROVIDERS[target]:  # it goes on without, and says nothing
        raise BackendError(
            f"ONNX Runtime did not start its {PROVIDERS[target]}",
            'Check the NVIDIA driver, and run: pip install "sd-toolkit[cuda]"',
        )
    return OnnxRuntimeEngine(
        session,
        component=component,
        engine=engine,
        max_batch=max_batch,
        stream=stream,
        weights=values,
    )


def _options(module: Any, *, threads: int, lean: bool) -> Any:
    options = module.SessionOptions()
    options.graph_optimization_level = module.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Named, because the default also pins each thread to a core of its own, which stalls the whole
    # pool as soon as one of those cores is busy with something else.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle threads spin for about a million turns by default, and steal the time of the next
    # engine and of numpy: 300 µs bridge the gaps inside a run at 0.6 of the processor time.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "300")
    options.log_severity_level = 3  # errors only: what matters arrives as an exception
    options.enable_cpu_mem_arena = not lean
    return options


def _session(
    module: Any,
    path: Path,
    options: Any,
    providers: Sequence[Any],
    disabled_optimizers: Sequence[str],
) -> Any:
    """By the first of ``providers`` that takes the graph."""
    failure: Exception | None = None
    for provider in providers:
        try:
            return module.InferenceSession(
                os.fspath(path),
                options,
                providers=[provider],
                enable_fallback=0,
                disabled_optimizers=disabled_optimizers,
            )
        except Exception as error:
            logger.debug("%s is not opened by %s: %s", path, provider, error)
            failure = error
    raise BackendError(f"ONNX Runtime cannot open {path}: {failure}", MEMORY_HINT) from failure


class OnnxRuntimeEngine(BoundEngine):
    """An `Engine` over one inference session; on a GPU it is one thread's to run."""

    def __init__(
        self,
        session: Any,
        *,
        component: ComponentEntry,
        engine: EngineEntry,
        max_batch: int,
        stream: Any,
        weights: Sequence[Any],
    ) -> None:
        super().__init__(
            component=component,
            engine=engine,
            max_batch=max_batch,
            xp=np if stream is None else import_package("cupy", extra="cuda"),
            inputs=map(_border, session.get_inputs()),
            outputs=map(_border, session.get_outputs()),
        )
        self._session = session
        self._stream = stream  # must outlive the session
        self._weights = weights  # as well

    def _new_binding(
        self, rows: Rows, inputs: dict[str, Array], outputs: dict[str, Array]
    ) -> OnnxRuntimeBinding:
        if self._stream is None:
            return OnnxRuntimeBinding(self._session, inputs, outputs)
        number = len(self._bindings) + len(self._calls) + 1
        return CudaBinding(
            self._session,
            inputs,
            outputs,
            stream=self._stream,
            cuda=self._xp.cuda,
            number=number,
        )

    def _release(self) -> None:
        self._session = None
        if self._stream is not None:
            release(self._xp)


def _border(argument: Any) -> tuple[str, str, int]:
    return argument.name, _DTYPES.get(argument.type, argument.type), len(argument.shape)
