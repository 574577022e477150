"""What OpenVINO is told to compute in, and what it can: named, for it chooses for itself else."""

from __future__ import annotations

import platform
from shlex import quote
from typing import TYPE_CHECKING, Any

from sd_engines.backends.openvino_package import core
from sd_engines.errors import BackendError
from sd_engines.kernel_file import kernel_text

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines.bundle import EngineEntry
    from sd_engines.spec import Precision

DEVICE = "CPU"
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16", "int8": "INT8"}
_IN_8_BITS = {"i8", "u8"}
_LARGE_LAYERS = {"Convolution", "FullyConnected", "MatMul"}


def check_precision(precision: Precision, *, bundle_path: Path | None = None) -> None:
    """`BackendError` where this processor does not compute in ``precision``.

    ``bundle_path`` is where the bundle lies whose engine is opened; None where one is made.
    """
    if not computes_in(precision):
        raise BackendError(
            f"OpenVINO does not compute in {precision} on this processor",
            "Name no precision: a graph of any precision runs in fp32."
            if bundle_path is None
            else f"sd-export build {quote(str(bundle_path))} --backend openvino --precision fp32",
        )


def computes_in(precision: Precision) -> bool:
    """Whether this processor does."""
    return _CAPABILITIES.get(precision) in core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")


def precision_hint(engine: EngineEntry) -> str:
    """OpenVINO's word for what ``engine`` computes in; of an int8 graph, what is not in 8 bits.

    That is never coarser than what was measured, and finer where this processor has no bf16.
    """
    if engine.precision != "int8":
        return _HINTS[engine.precision]
    return _HINTS["bf16" if engine.flags.get("rest") == "bf16" and computes_in("bf16") else "fp32"]


def products_are_scarce(engine: EngineEntry) -> bool:
    """Whether convolutions of ``engine`` wait for products here, and not for memory.

    So it was measured on x86 in fp32 and bf16, but for processors that multiply bf16 by whole tiles
    (AMX), many times as fast; elsewhere nothing was.
    """
    if platform.machine() != "x86_64" or engine.precision == "fp16":
        return False
    return precision_hint(engine) == "f32" or "amx_bf16" not in _processor_flags()


def _processor_flags() -> set[str]:
    """What Linux says that the processor can; nothing elsewhere."""
    lines = kernel_text("/proc/cpuinfo").splitlines()
    flags = (line for line in lines if line.startswith("flags"))
    return set(next(flags, "").split())


def computes_in_8_bits(compiled: Any) -> bool:
    """Whether any large layer of the graph, as it will run, does."""
    layers = (node.get_rt_info() for node in compiled.get_runtime_model().get_ops())
    return any(
        layer["layerType"].astype(str) in _LARGE_LAYERS
        and layer["runtimePrecision"].astype(str) in _IN_8_BITS
        for layer in layers
    )
