"""What the two TensorRT packages share: which module is which, its log, its words."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from sd_engines.border import import_package
from sd_engines.errors import BackendError

logger = logging.getLogger(__name__)

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def package(backend: str) -> Any:
    """The module of ``backend``; `BackendError` with the extra to install where it is missing."""
    return import_package(_MODULES[backend], extra=backend)


def failure(what: str, log: Any, words: list[str] | None = None) -> BackendError:
    """What failed, in the package's own words: the parser's, else the last that it logged."""
    said = (words or log.errors[-3:])[:5]
    text = "; ".join([what, *said]) if said else what
    if "out of memory" in text.lower() or "OutOfMemory" in text:
        return BackendError(text, "Free memory on the GPU, or make a bundle of smaller pictures.")
    return BackendError(text, "Name another backend, or another --precision, and report it.")


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
