"""OpenVINO: any ONNX of a bundle on the CPU, compiled for one fixed batch at a time.

The precision it computes in is named and read back: left to itself it takes bf16 on processors
that have it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
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
from sd_engines.bundle import portable_entry
from sd_engines.closing import Closing
from sd_engines.cores import usable_cores
from sd_engines.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from sd_engines.engine import Array, Progress
    from sd_engines.manifest import ComponentEntry, EngineEntry
    from sd_engines.spec import Precision, Profile

BACKEND = "openvino"
TARGET = "cpu"
_DEVICE = "CPU"
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}
_DTYPES = {
    "boolean": "bool",
    "u8": "uint8",
    "i32": "int32",
    "i64": "int64",
    "f16": "float16",
    "f32": "float32",
}
_HINT = "Check the memory that is free, or name another backend."


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
    """The engine entry of ``onnx_path``, which OpenVINO compiles when it is opened.

    ``precision`` is what it computes in, whatever the graph's: fp32 (default), or bf16 and fp16
    where this processor has them; `BackendError` where it has not.
    """
    if target not in (None, TARGET):
        raise ConfigError(f"unknown target {target!r}", f"OpenVINO runs on: {TARGET}.")
    precision = precision or "fp32"
    _check_precision(precision)
    return portable_entry(
        component,
        entry,
        profile,
        BACKEND,
        version=_package().__version__.partition("-")[0],
        target=TARGET,
        precision=precision,
    )


def check(engine: EngineEntry, *, bundle_path: Path) -> None:
    """`BackendError` where the package or the engine's precision is not here."""
    _check_precision(engine.precision)


def load(
    path: Path,
    *,
    component: ComponentEntry,
    engine: EngineEntry,
    max_batch: int,
    threads: int | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> OpenVinoEngine:
    """Read the ONNX at ``path``; it is compiled for a batch when that batch is first asked for.

    ``weights`` take the place of its initializers.

    ``threads`` None: every core this process may use. `BackendError` where the package or the
    precision is not here, or the graph cannot be read.
    """
    _check_precision(engine.precision)
    try:
        model = _core().read_model(os.fspath(path))
    except Exception as error:
        raise BackendError(f"OpenVINO cannot read {path}: {error}", _HINT) from error
    if weights:
        _replace_constants(model, weights)
    return OpenVinoEngine(
        model,
        component=component,
        engine=engine,
        max_batch=max_batch,
        threads=threads or usable_cores(),
    )


_LOADING = Lock()
"""Engines may be opened by several threads at once."""
_cores: list[Any] = []


def _package() -> Any:
    """Import openvino without its telemetry.

    ``import openvino`` alone sends an event to Intel and writes ``~/intel``; where its telemetry
    package cannot be imported, it takes an empty stub instead.
    """
    with _LOADING:
        if "openvino" in sys.modules or importlib.util.find_spec("openvino") is None:
            return import_package("openvino", extra="cpu")
        telemetry = "openvino_telemetry"
        before = {name: sys.modules[name] for name in (telemetry,) if name in sys.modules}
        sys.modules[telemetry] = None  # type: ignore[assignment]  # an import of it now fails
        try:
            return import_package("openvino", extra="cpu")
        finally:
            del sys.modules[telemetry]
            sys.modules.update(before)


def _core() -> Any:
    """The one ``Core`` of this process, which is never freed.

    A ``Core`` takes the thread's alternate signal stack, and when it is freed puts back the one
    it found: of two freed in the order they were made, the second puts back freed memory, and
    the next signal, Ctrl-C say, is a segmentation fault.
    """
    package = _package()
    with _LOADING:
        if not _cores:
            _cores.append(package.Core())
        return _cores[0]


def _check_precision(precision: Precision) -> None:
    if _CAPABILITIES[precision] not in _core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"):
        raise BackendError(
            f"OpenVINO does not compute in {precision} on this processor",
            "Name no precision: a graph of any precision runs in fp32.",
        )


class OpenVinoEngine(Closing):
    """An `Engine` over one model and a compiled form of it for each batch in use."""

    def __init__(
        self,
        model: Any,
        *,
        component: ComponentEntry,
        engine: EngineEntry,
        max_batch: int,
        threads: int,
    ) -> None:
        self.inputs = {spec.name: spec for spec in component.inputs}
        self.outputs = {spec.name: spec for spec in component.outputs}
        for kind, specs, ports in (
            ("inputs", self.inputs, model.inputs),
            ("outputs", self.outputs, model.outputs),
        ):
            check_graph(kind, specs, (_border(port, specs) for port in ports))
        self.entry = engine
        self._model = model
        self._max_batch = max_batch
        self._threads = threads
        self._compiled: dict[int, Any] = {}
        self._bindings: dict[int, OpenVinoBinding] = {}
        self._calls: dict[int, OpenVinoBinding] = {}
        self._lock = Lock()

    def bind(self, batch: int) -> OpenVinoBinding:
        """Buffers for ``batch`` rows, zeroed; the same ones for the same ``batch``."""
        check_batch(batch, self._max_batch)
        with self._lock:
            return self._binding(batch, self._bindings)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run once, on buffers that `bind` does not hand out; callers on other threads wait."""
        batch = check_arrays(self.inputs, arrays, self._max_batch)
        with self._lock:
            binding = self._binding(batch, self._calls)
            for name, array in arrays.items():
                binding.inputs[name][...] = array
            binding.run()
            return {name: array.copy() for name, array in binding.outputs.items()}

    def _binding(self, batch: int, kept: dict[int, OpenVinoBinding]) -> OpenVinoBinding:
        if self._model is None:
            raise closed_error()
        if batch not in kept:
            if batch not in self._compiled:
                self._compiled[batch] = self._compile(batch)
            inputs, outputs = (
                {name: np.zeros(shape_at(spec, batch), spec.dtype) for name, spec in specs.items()}
                for specs in (self.inputs, self.outputs)
            )
            kept[batch] = OpenVinoBinding(self._compiled[batch], inputs, outputs)
        return kept[batch]

    def _compile(self, batch: int) -> Any:
        model = self._model.clone()
        try:
            model.reshape(
                {
                    port: shape_at(self.inputs[_name(port, self.inputs)], batch)
                    for port in model.inputs
                }
            )
            compiled = _core().compile_model(
                model,
                _DEVICE,
                {
                    "PERFORMANCE_HINT": "LATENCY",
                    "NUM_STREAMS": "1",
                    "INFERENCE_NUM_THREADS": self._threads,
                    "INFERENCE_PRECISION_HINT": _HINTS[self.entry.precision],
                    "EXECUTION_MODE_HINT": "ACCURACY",
                    # Two pinned processes on one machine would share the same few cores.
                    "ENABLE_CPU_PINNING": False,
                },
            )
        except Exception as error:
            raise BackendError(f"OpenVINO cannot compile the graph: {error}", _HINT) from error
        found = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if found != _HINTS[self.entry.precision]:
            raise BackendError(
                f"OpenVINO computes in {found}, not in {self.entry.precision} as asked",
                "Make the engine for another backend: sd-export build BUNDLE --backend onnxruntime",
            )
        return compiled

    def close(self) -> None:
        """Free the compiled models and the buffers; twice is allowed."""
        with self._lock:
            for binding in (*self._bindings.values(), *self._calls.values()):
                binding.close()
            self._bindings.clear()
            self._calls.clear()
            self._compiled.clear()
            self._model = None


class OpenVinoBinding:
    """A `Binding`: one infer request over the memory of ``inputs`` and ``outputs``."""

    def __init__(self, compiled: Any, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._request = compiled.create_infer_request()
        tensor_class = _package().Tensor
        for arrays, ports in ((inputs, compiled.inputs), (outputs, compiled.outputs)):
            for port in ports:
                tensor = tensor_class(arrays[_name(port, arrays)], shared_memory=True)
                self._request.set_tensor(port, tensor)

    def run(self) -> None:
        """Run from ``inputs`` into ``outputs``."""
        if self._request is None:
            raise closed_error()
        try:
            self._request.infer(share_outputs=True)  # else it copies every output once more
        except Exception as error:
            raise BackendError(f"OpenVINO failed: {error}", _HINT) from error

    def close(self) -> None:
        """Let go of the request; the buffers stay the caller's."""
        self._request = None


def _replace_constants(model: Any, weights: Mapping[str, NDArray[Any]]) -> None:
    constants = {
        node.get_friendly_name(): node
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
    }
    for name, array in weights.items():
        constants[name].output(0).replace(_package().op.Constant(array).output(0))


def _name(port: Any, known: Any) -> str:
    """The name of ``port`` that the manifest knows: a port also has those of folded tensors."""
    names: set[str] = port.get_names()
    return next((name for name in sorted(names) if name in known), min(names, default="?"))


def _border(port: Any, known: Any) -> tuple[str, str, int]:
    dtype = port.get_element_type().get_type_name()
    return _name(port, known), _DTYPES.get(dtype, dtype), port.get_partial_shape().rank.get_length()
