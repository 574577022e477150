"""The packages of the extra ``export``, asked for before work that needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sd_engines.border import check_package
from sd_engines.bundle import PORTABLE_BACKENDS

if TYPE_CHECKING:
    from collections.abc import Iterable

_PACKAGES: Final = (
    *("torch", "diffusers", "transformers", "huggingface_hub", "safetensors"),
    *("onnx", "onnxscript", "sympy"),
)


def check_packages(*, extra: str = "export") -> None:
    """`BackendError` for the first that is not installed; ``extra`` is what brings them all."""
    for package in _PACKAGES:
        check_package(package, extra=extra)


def check_backends(backends: Iterable[str]) -> None:
    """`BackendError` for the first of `BACKENDS` among these that is not installed."""
    for backend in backends:
        extra = "cpu" if backend in PORTABLE_BACKENDS else backend
        check_package(backend.replace("-", "_"), extra=extra)
