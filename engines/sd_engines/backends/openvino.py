"""OpenVINO: any ONNX of a bundle on the CPU, compiled for one fixed batch at a time.

The precision it computes in is named and read back: left to itself it takes bf16 on processors
that have it. Graphs with 8-bit weights are its own: sd_export makes them, for they need pictures
to be calibrated with.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.backends.bound import BoundEngine
from sd_engines.backends.openvino_compiled import compiled
from sd_engines.backends.openvino_ir import read_ir
from sd_engines.backends.openvino_package import core, package
from sd_engines.backends.openvino_precision import check_precision, products_are_scarce
from sd_engines.backends.openvino_steady import STEADY_INPUT
from sd_engines.backends.openvino_winograd import halve_products
from sd_engines.border import MEMORY_HINT, closed_error, shape_at
from sd_engines.bundle import portable_entry
from sd_engines.cores import usable_cores
from sd_engines.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from sd_engines.backends.openvino_compiled import Compiled
    from sd_engines.border import Rows
    from sd_engines.engine import Array, Progress
    from sd_engines.entries import ComponentEntry, EngineEntry
    from sd_engines.spec import Precision, Profile

BACKEND = "openvino"
TARGET = "cpu"
_DTYPES = {
    "boolean": "bool",
    "u8": "uint8",
    "i32": "int32",
    "i64": "int64",
    "f16": "float16",
    "f32": "float32",
}


def default_target(_backend: str) -> str:
    """What an engine is for where nobody says."""
    return TARGET


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
    where this processor has them; `BackendError` where it has not. `ConfigError` for int8, which
    `sd_export.int8` makes.
    """
    if precision == "int8":
        raise ConfigError(
            "an int8 engine is calibrated on pictures, not compiled from ONNX",
            "Make it with: sd-export build BUNDLE --backend openvino --precision int8",
        )
    if target not in (None, TARGET):
        raise ConfigError(f"unknown target {target!r}", f"OpenVINO runs on: {TARGET}.")
    precision = precision or "fp32"
    check_precision(precision)
    return portable_entry(
        component,
        entry,
        profile,
        BACKEND,
        version=version(),
        target=TARGET,
        precision=precision,
    )


def version() -> str:
    """OpenVINO's, such as 2026.4.1."""
    return str(package().__version__).partition("-")[0]


def check(engine: EngineEntry, *, bundle_path: Path) -> None:
    """`BackendError` where the package or the engine's precision is not here."""
    check_precision(engine.precision, bundle_path=bundle_path)


def load(
    path: Path,
    *,
    component: ComponentEntry,
    engine: EngineEntry,
    max_batch: int,
    threads: int | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> OpenVinoEngine:
    """Read the graph at ``path``; it is compiled for a batch when that batch is first asked for.

    ``threads`` None: every core this process may use. ``weights`` take the place of its
    initializers. `BackendError` where the package or the precision is not here, or the graph cannot
    be read.
    """
    check_precision(engine.precision)
    mapped = None
    if engine.is_built:
        model, mapped = read_ir(path)
    else:
        try:
            model = core().read_model(os.fspath(path))
        except Exception as error:
            raise BackendError(f"OpenVINO cannot read {path}: {error}", MEMORY_HINT) from error
    if weights:
        _replace_constants(model, weights)
    if products_are_scarce(engine):
        halve_products(model)
    return OpenVinoEngine(
        model,
        mapped,
        component=component,
        engine=engine,
        max_batch=max_batch,
        threads=threads or usable_cores(),
    )


class OpenVinoEngine(BoundEngine):
    """An `Engine` over one model and a compiled form of it for each batch in use."""

    def __init__(
        self,
        model: Any,
        mapped: Any,
        *,
        component: ComponentEntry,
        engine: EngineEntry,
        max_batch: int,
        threads: int,
    ) -> None:
        inputs, outputs = ({spec.name for spec in s} for s in (component.inputs, component.outputs))
        super().__init__(
            component=component,
            engine=engine,
            max_batch=max_batch,
            xp=np,
            inputs=(_border(port, inputs) for port in model.inputs),
            outputs=(_border(port, outputs) for port in model.outputs),
        )
        self._model = model
        self._mapped = mapped  # must outlive the model and all compiled from it
        self._threads = threads
        self._compiled: dict[Rows, Compiled] = {}

    def _new_binding(
        self, rows: Rows, inputs: dict[str, Array], outputs: dict[str, Array]
    ) -> OpenVinoBinding:
        if rows not in self._compiled:
            self._compiled[rows] = self._compile(rows)
        return OpenVinoBinding(self._compiled[rows], self._mapped, inputs, outputs)

    def _compile(self, rows: Rows) -> Compiled:
        model = self._model.clone()
        shapes = {
            port: shape_at(self.inputs[_name(port, self.inputs)], *rows) for port in model.inputs
        }
        borders = frozenset(self.inputs | self.outputs)
        return compiled(model, shapes, borders, self.entry, threads=self._threads)

    def _release(self) -> None:
        self._compiled.clear()
        self._model = self._mapped = None


class OpenVinoBinding:
    """A `Binding`: one infer request over the memory of ``inputs`` and ``outputs``.

    And one of what the prompt alone decides, where the graph has such a part.
    """

    def __init__(
        self, compiled: Compiled, mapped: Any, inputs: dict[str, Array], outputs: dict[str, Array]
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._mapped = mapped  # must outlive the requests
        self._handed_over: dict[str, Array] = {}  # OpenVINO does not hold what it reads and writes
        self._steady = None
        if compiled.steady is not None:
            for port in compiled.steady.outputs:
                name, dtype, _ = _border(port, ())
                self._handed_over[name] = np.empty(tuple(port.get_shape()), dtype)
            self._steady = _request(compiled.steady, inputs, self._handed_over)
            self._prompt = np.full_like(inputs[STEADY_INPUT], np.nan)  # which equals none
            self._differs = np.empty(self._prompt.shape, np.bool_)
        self._request = _request(compiled.moving, {**inputs, **self._handed_over}, outputs)

    def run(self) -> None:
        """Run from ``inputs`` into ``outputs``."""
        if self._request is None:
            raise closed_error()
        try:
            if self._steady is not None:
                prompt = self.inputs[STEADY_INPUT]
                if np.count_nonzero(np.not_equal(prompt, self._prompt, out=self._differs)):
                    self._steady.infer(share_outputs=True)
                    self._prompt[...] = prompt
            self._request.infer(share_outputs=True)  # else it copies every output once more
        except Exception as error:
            raise BackendError(f"OpenVINO failed: {error}", MEMORY_HINT) from error

    def close(self) -> None:
        """Let go of the requests; the buffers stay the caller's."""
        self._request = self._steady = None


def _request(compiled: Any, inputs: dict[str, Array], outputs: dict[str, Array]) -> Any:
    """An infer request that reads and writes the arrays of its ports' names."""
    request = compiled.create_infer_request()
    tensor_class = package().Tensor
    for arrays, ports in ((inputs, compiled.inputs), (outputs, compiled.outputs)):
        for port in ports:
            request.set_tensor(port, tensor_class(arrays[_name(port, arrays)], shared_memory=True))
    return request


def _replace_constants(model: Any, weights: Mapping[str, NDArray[Any]]) -> None:
    constants = {
        node.get_friendly_name(): node
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
    }
    for name, array in weights.items():
        constants[name].output(0).replace(package().op.Constant(array).output(0))


def _name(port: Any, known: Any) -> str:
    """The name of ``port`` that the manifest knows: a port also has those of folded tensors."""
    names: set[str] = port.get_names()
    return next((name for name in sorted(names) if name in known), min(names, default="?"))


def _border(port: Any, known: Any) -> tuple[str, str, int]:
    dtype = port.get_element_type().get_type_name()
    return _name(port, known), _DTYPES.get(dtype, dtype), port.get_partial_shape().rank.get_length()
