"""What the two TensorRT packages share: which module is which, its log, its words, its GPU."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

from sd_engines.border import import_package
from sd_engines.errors import BackendError

logger = logging.getLogger(__name__)

ANY_TARGET = "any"
"""The target of a TensorRT-RTX plan made for every GPU that its version supports."""
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_NO_GPU_HINT = (
    "Run it on a machine with an NVIDIA GPU and its driver (nvidia-smi shows both), or name a "
    "backend that runs here: --backend onnxruntime"
)


def package(backend: str) -> Any:
    """The module of ``backend``; `BackendError` with the extra to install where it is missing."""
    return import_package(_MODULES[backend], extra=backend)


def compute_capability() -> int:
    """Of this process's first GPU, such as 89; `BackendError` where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError("there is no NVIDIA driver on this machine", _NO_GPU_HINT) from error
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        raise BackendError("the NVIDIA driver finds no GPU", _NO_GPU_HINT)
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
    return major.value * 10 + minor.value


def failure(what: str, log: Any, words: list[str] | None = None) -> BackendError:
    """What failed, in the package's own words: the parser's, else the last that it logged."""
    said = (words or log.errors[-3:])[:5]
    text = "; ".join([what, *said]) if said else what
    if "out of memory" in text.lower() or "OutOfMemory" in text:
        return BackendError(text, "Free memory on the GPU, or make a bundle of smaller pictures.")
    return BackendError(
        text, "Name another backend, or another --precision or opset, and report it."
    )


@cache
def package_log(module: Any) -> Any:
    """The one logger of ``module``: it keeps the first it is given for the whole process."""

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.min_severity = module.Logger.Severity.WARNING
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(module.Logger.Severity.ERROR):
                self.errors.append(message)
            logger.debug("%s: %s", module.__name__, message)

    return Log()
