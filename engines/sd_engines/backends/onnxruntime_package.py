"""The package of ONNX Runtime: which provider is for which target, and whether it is here."""

from __future__ import annotations

import io
import logging
import os
from contextlib import redirect_stdout
from functools import cache
from typing import Any

from sd_engines.border import import_package
from sd_engines.errors import BackendError, ConfigError, nearest

logger = logging.getLogger(__name__)

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's names of `EngineEntry.target`."""


def package(target: str) -> Any:
    """The module, with what ``target`` needs: `BackendError` where that is not here."""
    if target not in PROVIDERS:
        raise ConfigError(f"unknown target {target!r}", nearest(target, PROVIDERS))
    # Before the import, which else writes an identifier into ~/.cache and sends events.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    module = import_package("onnxruntime", extra=target)
    if PROVIDERS[target] not in module.get_available_providers():
        raise BackendError(
            f"this onnxruntime has no {PROVIDERS[target]}",
            f'pip uninstall onnxruntime, then pip install "sd-toolkit[{target}]"',
        )
    if target == "cuda":
        _load_libraries(module)
    return module


@cache
def _load_libraries(module: Any) -> None:
    """Load CUDA and cuDNN from where pip put them, or it looks for the system's alone."""
    with redirect_stdout(io.StringIO()) as said:
        module.preload_dlls()
    logger.debug("%s", said.getvalue())
