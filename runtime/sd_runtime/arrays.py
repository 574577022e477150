"""Crossing between host arrays (numpy) and an engine's own (numpy, or CuPy on a GPU)."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.border import import_package

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from sd_engines.engine import Array


def copy_into(target: Array, source: Array) -> None:
    """Write ``source`` into ``target``, wherever each of them lives."""
    target[...] = moved(source, like=target)


def moved(array: Array, *, like: Array) -> Array:
    """``array``, or a copy of it where ``like`` lives.

    On its way to a GPU nobody waits: what is copied from is free to be changed at once. The other
    way the host waits.
    """
    if isinstance(like, np.ndarray):
        return to_host(array)
    return import_package("cupy", extra="cuda").asarray(array)


def to_host(array: Array) -> NDArray[Any]:
    """``array`` as numpy; waits for the GPU where it lives there."""
    return array if isinstance(array, np.ndarray) else array.get()


@cache
def elementwise(inputs: str, outputs: str, operation: str, name: str) -> Any:
    """A ``cupy.ElementwiseKernel``: one launch for what would be one a sum or product of arrays.

    Compiled when it first runs, and kept on disk by CuPy.
    """
    return import_package("cupy", extra="cuda").ElementwiseKernel(inputs, outputs, operation, name)


def current_stream() -> AbstractContextManager[object]:
    """The stream that this thread works on, for others to work on it too: CuPy's is a thread's own.

    Nobody has one who has not imported CuPy, or has no GPU.
    """
    cupy: Any = sys.modules.get("cupy")
    if cupy is None or not cupy.cuda.is_available():
        return nullcontext()
    stream: AbstractContextManager[object] = cupy.cuda.get_current_stream()
    return stream


def on_stream(cuda_stream: int) -> AbstractContextManager[object]:
    """Where this thread's work for a GPU is enqueued: a caller's cudaStream_t, or 0, CuPy's own.

    `BackendError` for a stream where CuPy is missing.
    """
    if not cuda_stream:
        return nullcontext()
    cuda = import_package("cupy", extra="cuda").cuda
    stream: AbstractContextManager[object] = cuda.ExternalStream(cuda_stream)
    return stream
