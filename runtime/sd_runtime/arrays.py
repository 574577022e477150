"""Crossing between host arrays (numpy) and an engine's own (numpy, or CuPy on a GPU)."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np

from sd_engines.border import import_package
from sd_engines.errors import BackendError, BundleError, ConfigError
from sd_engines.node import REMAKE_HINT

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from sd_engines.engine import Array
    from sd_engines.entries import EngineEntry

_DEFAULT_STREAMS: Final = (1, 2)
"""CUDA's handles of the legacy default stream and of a thread's own."""
WorkStream: TypeAlias = "AbstractContextManager[object]"
"""Within it a thread enqueues work for a GPU: a stream of CuPy's, or `NO_STREAM`."""
NO_STREAM: Final[WorkStream] = nullcontext()


def copy_into(target: Array, source: Array) -> None:
    """Write ``source`` into ``target``, wherever each of them lives.

    `BundleError` where their shapes differ: numpy would repeat what is one row, or one channel.
    """
    if target.shape != source.shape:
        raise BundleError(
            f"an array of {source.shape} has no place in one of {target.shape}", REMAKE_HINT
        )
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


def work_stream(engines: Iterable[EngineEntry]) -> WorkStream:
    """Where what ``engines`` do on a GPU is enqueued; any thread may enter it.

    It is CuPy's current stream or, where that is the default one, another: what is on the default
    one waits for all others, and cannot be captured. `NO_STREAM` where there is no GPU or no CuPy,
    or ``engines`` are for none.
    """
    if all(engine.target == "cpu" for engine in engines):
        return NO_STREAM
    try:
        cuda = import_package("cupy", extra="cuda").cuda
    except BackendError:
        return NO_STREAM
    if not cuda.is_available():
        return NO_STREAM
    current = cuda.get_current_stream()
    stream: WorkStream = current if current.ptr else cuda.Stream(non_blocking=True)
    return stream


class CallersStream(NamedTuple):
    """A ``cudaStream_t`` as other libraries take it, by the CUDA stream protocol."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def on_stream(cuda_stream: int) -> WorkStream:
    """Where this thread's work for a GPU is enqueued: a caller's cudaStream_t, or 0, CuPy's own.

    `BackendError` for a stream where CuPy is missing, `ConfigError` for the default ones.
    """
    if not cuda_stream:
        return NO_STREAM
    if cuda_stream in _DEFAULT_STREAMS:
        raise ConfigError(
            "a default stream of CUDA cannot be captured", "Make one: cudaStreamCreateWithFlags."
        )
    cuda = import_package("cupy", extra="cuda").cuda
    stream: WorkStream = cuda.Stream.from_external(CallersStream(cuda_stream))
    return stream
