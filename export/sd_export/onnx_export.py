"""Traces a torch module into an ONNX graph, and writes it to disk."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import warnings
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from sd_engines.errors import ExportError
from sd_engines.spec import BATCH
from sd_export.onnx_passes import tidy
from sd_export.shared_rows import share_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sd_engines.spec import TensorSpec

OPSET = 23
"""Keeps Attention and GroupNormalization whole, which ONNX Runtime and OpenVINO run faster."""
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
_TRACED_BATCH = 2  # any number but 1, which torch would fold into the graph
_MAX_TRACED_BATCH = 63  # diffusers upsamples 64 rows another way, and torch would trace anew


def trace(
    module: torch.nn.Module,
    *,
    component: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    opset: int = OPSET,
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
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=opset,
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


def save(model: ir.Model, folder: Path) -> int:
    """Write ``model`` and its weights below ``folder``, one file each; bytes written.

    Only what a graph reads while it is loaded, shapes and axes, stays inside it. `OSError` where
    the disk is full, which onnx_ir does not always notice.
    """
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    folder.mkdir(parents=True)
    ir.save(model, folder / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=64)
    _check_whole(folder)
    return sum(path.stat().st_size for path in folder.iterdir())


def _check_whole(folder: Path) -> None:
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    places = [{entry.key: entry.value for entry in t.external_data} for t in graph.initializer]
    end = max((int(p["offset"]) + int(p["length"]) for p in places if p), default=0)
    path = folder / DATA_FILE
    if end and path.stat().st_size < end:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


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
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
