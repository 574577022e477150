"""Traces a torch module into an ONNX graph, and writes it to disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import warnings
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from sd_engines.errors import ExportError
from sd_engines.spec import BATCH
from sd_export.onnx_passes import tidy
from sd_export.quiet import quiet_loggers
from sd_export.shared_rows import share_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from sd_engines.spec import TensorSpec

OPSET = 23
"""Keeps Attention and GroupNormalization whole, which ONNX Runtime and OpenVINO run faster."""
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
_SMALL_BYTES = 64  # tensors up to it, shapes and axes, stay inside the graph
_TRACED_BATCH = 2  # any number but 1, which torch would fold into the graph
_MAX_TRACED_BATCH = 63  # diffusers upsamples 64 rows another way, and torch would trace anew


def trace(
    module: torch.nn.Module,
    *,
    component: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> ir.Model:
    """``module`` as an ONNX graph whose border is ``inputs`` and ``outputs``, by name and order.

    Axis 0 is symbolic, all else fixed; what rows of `PICTURES` share is computed once. The graph
    shares the module's weights until it is saved.
    Raises `ExportError` where torch cannot trace it or the border comes out differently.
    """
    arguments = tuple(
        torch.zeros(
            [_TRACED_BATCH if isinstance(size, str) else size for size in spec.shape],
            dtype=getattr(torch, spec.dtype),
        )
        for spec in inputs
    )
    axis = torch.export.Dim(BATCH, min=1, max=_MAX_TRACED_BATCH)
    try:
        with torch.no_grad(), _quiet(), _operators_read_once():
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                dynamic_shapes=_dynamic_shapes(module, [{0: axis} for _ in inputs]),
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"torch {torch.__version__} cannot trace it: {first}",
            "Report it with the checkpoint's config.json and this message.",
            component=component,
            stage="trace",
        ) from error
    assert program is not None  # noqa: S101  (None only where a path was given)
    model = share_rows(tidy(program.model), inputs)
    _check_border(model, component=component, inputs=inputs, outputs=outputs)
    return model


def _dynamic_shapes(module: torch.nn.Module, shapes: list[dict[int, Any]]) -> tuple[Any, ...]:
    """``shapes`` as torch wants them: those that a starred argument takes as one tuple."""
    kinds = [parameter.kind for parameter in signature(module.forward).parameters.values()]
    if Parameter.VAR_POSITIONAL not in kinds:
        return tuple(shapes)
    named = kinds.index(Parameter.VAR_POSITIONAL)
    return (*shapes[:named], tuple(shapes[named:]))


def save(model: ir.Model, folder: Path) -> list[Path]:
    """Write ``model`` and its weights below ``folder``, one file each; their paths.

    Only what a graph reads while it is loaded, shapes and axes, stays inside it. `OSError` where
    the disk is full, which onnx_ir does not always notice.
    """
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    folder.mkdir(parents=True)
    path = folder / MODEL_FILE
    ir.save(model, path, external_data=DATA_FILE, size_threshold_bytes=_SMALL_BYTES)
    return [path, *_check_whole(path)]


def save_beside(model: ir.Model, path: Path) -> list[Path]:
    """Write ``model`` to ``path``, beside a graph that `save` wrote; the paths of all its files.

    What that graph has to the byte it reads from the same file, the rest from one of its own.
    """
    known = _stored(path.with_name(MODEL_FILE))
    own = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _SMALL_BYTES:
            continue
        place = known.get(hashlib.sha256(tensor.tobytes()).digest())
        if place is None:
            own.append(value)
        else:
            offset, length = place
            value.const_value = ir.ExternalTensor(
                DATA_FILE,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.numpy().shape),
                name=value.name or "",
                base_dir=path.parent,
            )
    tensors = [value.const_value for value in own if value.const_value is not None]
    if tensors:
        apart = ir.external_data.convert_tensors_to_external(
            tensors, path.parent, f"{path.name}_data"
        )
        for value, tensor in zip(own, apart, strict=True):
            value.const_value = tensor
    ir.save(model, path)
    return [path, *_check_whole(path)]


def external_places(path: Path) -> dict[str, dict[str, str]]:
    """Of each tensor outside the graph at ``path``: its ``location``, ``offset`` and ``length``."""
    graph = onnx.load(path, load_external_data=False).graph
    return {t.name: external_place(t) for t in graph.initializer if t.external_data}


def external_place(tensor: onnx.TensorProto) -> dict[str, str]:
    """``location``, ``offset`` and ``length`` of one; empty where it is inside the graph."""
    return {entry.key: entry.value for entry in tensor.external_data}


def _stored(path: Path) -> dict[bytes, tuple[int, int]]:
    """Where the tensors of the graph at ``path`` lie, offset and length, by their SHA-256."""
    stored: dict[bytes, tuple[int, int]] = {}
    places = external_places(path).values()
    if not places:  # nor is there a file
        return stored
    with path.with_name(DATA_FILE).open("rb") as file:
        for offset, length in sorted((int(p.get("offset", 0)), int(p["length"])) for p in places):
            file.seek(offset)
            stored[hashlib.sha256(file.read(length)).digest()] = offset, length
    return stored


def _check_whole(path: Path) -> list[Path]:
    """The files that the graph at ``path`` reads; `OSError` where one ends too early."""
    ends: dict[str, int] = {}
    for place in external_places(path).values():
        end = int(place.get("offset", 0)) + int(place["length"])
        ends[place["location"]] = max(end, ends.get(place["location"], 0))
    for location, end in ends.items():
        if path.with_name(location).stat().st_size < end:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path.with_name(location)))
    return [path.with_name(location) for location in sorted(ends)]


def _check_border(
    model: ir.Model,
    *,
    component: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> None:
    for values, specs in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        found = [_described(value) for value in values]
        wanted = [(spec.name, spec.dtype, spec.shape) for spec in specs]
        if found != wanted:
            raise ExportError(
                f"the graph's border is {found}, not {wanted}",
                "Report it with the checkpoint's config.json and this message.",
                component=component,
                stage="trace",
            )


def _described(value: ir.Value) -> tuple[str | None, str, tuple[int | str, ...]]:
    dtype = np.dtype(value.dtype.numpy()).name if value.dtype is not None else "unknown"
    shape = tuple(
        size if isinstance(size, int) else str(size.value)
        for size in (value.shape if value.shape is not None else ())
    )
    return value.name, dtype, shape


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on its own internals out of the user's terminal."""
    with quiet_loggers("torch.onnx"):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _operators_read_once() -> Iterator[None]:
    """Keep torch's table of ONNX operators, for which it parses 500 functions anew each trace."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # a torch that keeps it elsewhere, and goes on reading
        yield
        return
    own, table = vars(ONNXRegistry)["from_torchlib"], _operators()
    ONNXRegistry.from_torchlib = staticmethod(table)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = own  # type: ignore[method-assign]


@cache
def _operators() -> Callable[..., Any]:
    """Torch's own reader of its table, which remembers what it read."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return cache(ONNXRegistry.from_torchlib)
