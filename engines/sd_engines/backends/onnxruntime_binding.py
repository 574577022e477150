"""A session of ONNX Runtime tied to fixed memory: on the CPU run, on a GPU enqueued."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final

from sd_engines.backends.cuda import named_stream
from sd_engines.border import MEMORY_HINT, closed_error, import_package
from sd_engines.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sd_engines.engine import Array

logger = logging.getLogger(__name__)

_NOT_CAPTURED: Final = -1


class OnnxRuntimeBinding:
    """A `Binding` of ``inputs`` and ``outputs``, numpy arrays."""

    def __init__(
        self, session: Any, inputs: dict[str, Array], outputs: dict[str, Array], device: str = "cpu"
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._session = session
        self._io = session.io_binding()
        for arrays, bind in ((inputs, self._io.bind_input), (outputs, self._io.bind_output)):
            for name, array in arrays.items():
                address = array.ctypes.data if device == "cpu" else array.data.ptr
                bind(name, device, 0, array.dtype.type, array.shape, address)
        self._options = _run_options({})

    def run(self) -> None:
        """Run from ``inputs`` into ``outputs``."""
        if self._session is None:
            raise closed_error()
        try:
            self._session.run_with_iobinding(self._io, self._options)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {error}", MEMORY_HINT) from error

    def close(self) -> None:
        """Let go of the session; the buffers stay the caller's."""
        self._session = self._io = None


class CudaBinding(OnnxRuntimeBinding):
    """A `Binding` of CuPy arrays: its runs are enqueued on ``stream``, the session's own.

    ``number`` tells it from the session's others: what its first runs capture as a CUDA graph the
    later ones launch.
    """

    def __init__(
        self,
        session: Any,
        inputs: dict[str, Array],
        outputs: dict[str, Array],
        *,
        stream: Any,
        cuda: Any,
        number: int,
    ) -> None:
        super().__init__(session, inputs, outputs, "cuda")
        self._stream = stream
        self._cuda = cuda
        self._is_captured = True
        self._options = _graph_options(number)

    def run(self) -> None:
        """Enqueue, in the order of CuPy's current stream."""
        current = named_stream(self._cuda)
        is_other = current.ptr != self._stream.ptr
        if is_other:
            self._stream.wait_event(current.record())
        try:
            super().run()
        except BackendError as error:
            if not self._is_captured or self._session is None:
                raise
            logger.warning("is not captured any more, and enqueued node by node: %s", error)
            self._is_captured = False
            self._options = _graph_options(_NOT_CAPTURED)
            with contextlib.suppress(Exception):  # it ends a capture, and there may be none
                self._cuda.runtime.streamEndCapture(self._stream.ptr)
            super().run()
        if is_other:
            current.wait_event(self._stream.record())

    def close(self) -> None:
        """Let go of the session once the device is done with it."""
        if self._session is not None:
            self._stream.synchronize()
        super().close()


def _graph_options(number: int) -> Any:
    return _run_options(
        {"disable_synchronize_execution_providers": "1", "gpu_graph_id": str(number)}
    )


def _run_options(entries: Mapping[str, str]) -> Any:
    options = import_package("onnxruntime", extra="cpu").RunOptions()
    for key, value in entries.items():
        options.add_run_config_entry(key, value)
    return options
