"""Where a pipeline's work for a GPU is enqueued: never on the default stream."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, cast

from sd_engines.border import import_package
from sd_engines.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from sd_engines.entries import EngineEntry

_DEFAULT_STREAMS: Final = (1, 2)
"""CUDA's handles of the legacy default stream and of a thread's own."""
WorkStream: TypeAlias = "AbstractContextManager[object]"
"""Within it a thread enqueues work for a GPU: a stream of CuPy's, or `NO_STREAM`."""
NO_STREAM: Final[WorkStream] = nullcontext()


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


def finish(stream: WorkStream) -> None:
    """Wait for what was enqueued within ``stream``: no other stream does by itself."""
    if stream is not NO_STREAM:
        cast("Any", stream).synchronize()


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
