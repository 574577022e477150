"""The packages of the extra ``export``, asked for before work that needs them."""

from __future__ import annotations

from typing import Final

from sd_engines.border import check_package

_PACKAGES: Final = (
    *("torch", "diffusers", "transformers", "huggingface_hub", "safetensors"),
    *("onnx", "onnxscript", "sympy"),
)


def check_packages(*, extra: str = "export") -> None:
    """`BackendError` for the first that is not installed; ``extra`` is what brings them all."""
    for package in _PACKAGES:
        check_package(package, extra=extra)
