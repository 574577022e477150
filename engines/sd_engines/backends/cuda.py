"""What engines on an NVIDIA GPU share: the stream that they run on, and launching all at once."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


def named_stream(cuda: Any) -> Any:
    """``cupy.cuda``'s current stream, or in place of the default one another, always the same.

    The default one can neither be handed to an engine nor be captured.
    """
    stream = cuda.get_current_stream()
    return stream if stream.ptr else _beside_default(cuda)


@cache
def _beside_default(cuda: Any) -> Any:
    """A stream that blocks: the device keeps the two in order, and the host need not wait."""
    return cuda.Stream(non_blocking=False)


def release(cupy: Any) -> None:
    """Give the GPU back what nobody uses any more: CuPy keeps it for the next who asks."""
    cupy.get_default_memory_pool().free_all_blocks()


class Replay:
    """Work that is enqueued again and again, from the second time on as one CUDA graph.

    ``enqueue`` takes a cudaStream_t, always enqueues the same work on the same memory, and raises
    where it cannot. Hundreds of kernels are then one launch; work that cannot be captured goes on
    being enqueued as it is.
    """

    def __init__(self, enqueue: Callable[[int], None], cuda: Any) -> None:
        self._enqueue = enqueue
        self._cuda = cuda
        self._graph: Any = None
        self._ran = False

    def run(self, stream: Any) -> None:
        """Enqueue on ``stream``, a CuPy one."""
        if self._graph is not None:
            self._graph.launch(stream)
            return
        self._enqueue(stream.ptr)
        if not self._ran:  # TensorRT must have run once before it is captured
            self._ran = True
            self._graph = self._captured()

    def _captured(self) -> Any:
        """The work as a graph, which runs nothing yet; None where it cannot be captured."""
        try:
            stream = self._cuda.Stream(non_blocking=True)
            stream.begin_capture()
            try:
                self._enqueue(stream.ptr)
            finally:
                graph = stream.end_capture()
        except Exception as error:
            logger.info("cannot be captured, and is enqueued kernel by kernel: %s", error)
            return None
        return graph
