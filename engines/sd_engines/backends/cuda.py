"""What engines on an NVIDIA GPU share: the GPU, the stream that they run on, launching at once."""

from __future__ import annotations

import ctypes
import logging
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

from sd_engines.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_NO_GPU_HINT = (
    "Run it on a machine with an NVIDIA GPU and its driver (nvidia-smi shows both), or name a "
    "backend that runs here: --backend onnxruntime"
)
_beside_default: dict[Any, Any] = {}
_workspaces: WeakValueDictionary[int, Workspace] = WeakValueDictionary()
_making = Lock()


class Gpu(NamedTuple):
    """A model of GPU: its compute capability, such as 89, and what its driver calls it."""

    capability: int
    name: str


def this_gpu() -> Gpu:
    """The first that this process sees; `BackendError` where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError("there is no NVIDIA driver on this machine", _NO_GPU_HINT) from error
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        raise BackendError("the NVIDIA driver finds no GPU", _NO_GPU_HINT)
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
    driver.cuDeviceGetName(name, len(name), device)
    return Gpu(major.value * 10 + minor.value, name.value.decode(errors="replace"))


def compute_capability() -> int:
    """That of `this_gpu`, such as 89; `BackendError` where there is none."""
    return this_gpu().capability


def named_stream(cuda: Any) -> Any:
    """``cupy.cuda``'s current stream, or in place of the default one another, always the same.

    The default one can neither be handed to an engine nor be captured. The one in its place blocks:
    the device keeps the two in order, and the host need not wait.
    """
    stream = cuda.get_current_stream()
    if stream.ptr:
        return stream
    with _making:
        if cuda not in _beside_default:
            _beside_default[cuda] = cuda.Stream(non_blocking=False)
        return _beside_default[cuda]


def release(cupy: Any) -> None:
    """Give the GPU back what nobody uses any more: CuPy keeps it for the next who asks."""
    cupy.get_default_memory_pool().free_all_blocks()


class Workspace:
    """Memory that engines work in one after another: all those that run on one stream.

    It is as large as the largest of them needs. Who has been given a smaller one keeps that.
    """

    def __init__(self) -> None:
        self._growing = Lock()
        self._memory: Any = None
        self._bytes = -1

    def reserve(self, size: int, cuda: Any) -> Any:
        """CuPy's pointer to at least ``size`` bytes; `BackendError` where there are none."""
        with self._growing:
            if size > self._bytes:
                try:
                    self._memory = cuda.alloc(size)
                except MemoryError as error:  # CuPy's is one
                    raise BackendError(
                        f"no memory for an engine's activations, {size / 1e6:.0f} MB: {error}",
                        "Free memory on the GPU, or ask for fewer or smaller pictures at once.",
                    ) from error
                self._bytes = size
            return self._memory


def workspace_of(stream: Any) -> Workspace:
    """That of ``stream``; it is gone when nobody holds it any more."""
    with _making:
        workspace = _workspaces.get(stream.ptr)
        if workspace is None:
            workspace = _workspaces[stream.ptr] = Workspace()
        return workspace


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
        """Enqueue on ``stream``, a CuPy one; the first time, wait for it."""
        if self._graph is not None:
            self._graph.launch(stream)
            return
        self._enqueue(stream.ptr)
        if not self._ran:  # TensorRT must have run once, to its end, before it is captured
            self._ran = True
            stream.synchronize()
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
            logger.warning("cannot be captured, and is enqueued kernel by kernel: %s", error)
            return None
        return graph
