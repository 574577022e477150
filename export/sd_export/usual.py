"""What a command line of ``sd-export`` means that names neither backends nor where to write."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sd_engines.backends.cuda import compute_capability
from sd_engines.bundle import BACKENDS, PORTABLE_BACKENDS
from sd_engines.errors import BackendError, ConfigError
from sd_export.precision import check_request

if TYPE_CHECKING:
    from sd_engines.spec import Precision

logger = logging.getLogger(__name__)

_SINGLE_FILES = (".safetensors", ".ckpt")


def usual_backends(precision: Precision | None) -> tuple[str, ...]:
    """What suits this machine, of what is installed and takes ``precision``.

    TensorRT, or else TensorRT-RTX, where there is an NVIDIA GPU to build for; otherwise all that
    run on its processor. ONNX Runtime where there is nothing, whose error says what to install.
    """
    for_gpu = [name for name in BACKENDS if name not in PORTABLE_BACKENDS and _is_here(name)]
    has_gpu = False
    with suppress(BackendError):
        has_gpu = compute_capability() > 0
    if has_gpu and not for_gpu:
        logger.warning(
            "No engine is made for this machine's GPU: TensorRT is not installed "
            '(pip install "sd-toolkit[tensorrt]")'
        )
    if has_gpu and for_gpu:
        return (for_gpu[0],)
    found = tuple(name for name in PORTABLE_BACKENDS if _is_here(name) and _takes(name, precision))
    return found or ("onnxruntime",)


def usual_output(model: str) -> Path:
    """The bundle beside us that is called after ``model``: its last part, without a file's kind."""
    name = os.path.basename(os.path.abspath(model))  # noqa: PTH100, PTH119 (a Hub id is no path)
    stem, suffix = os.path.splitext(name)  # noqa: PTH122
    return Path((stem if suffix in _SINGLE_FILES else name) + ".bundle")


def _is_here(backend: str) -> bool:
    return find_spec(backend.replace("-", "_")) is not None


def _takes(backend: str, precision: Precision | None) -> bool:
    try:
        check_request([backend], precision)
    except ConfigError:
        return False
    return True
