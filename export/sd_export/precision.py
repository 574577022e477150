"""Which component computes in which precision, decided in one place.

fp16 is for the UNet, where nearly all the time goes: the VAE overflows in it (its known black
pictures) and the text encoder's mask does too. bf16 reaches as far as fp32, so OpenVINO, which
converts as it compiles, takes it for them as well. A safety checker answers yes or no: fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from sd_engines.bundle import BACKENDS, PORTABLE_BACKENDS
from sd_engines.errors import ConfigError, nearest
from sd_engines.spec import Precision

if TYPE_CHECKING:
    from collections.abc import Sequence

_COARSENESS = ("fp32", "fp16", "bf16")
HALVED = ("unet", "unet_shallow")
"""Components whose graphs become half precision where it is asked for."""


def check_request(backends: Sequence[str], precision: str | None) -> None:
    """`ConfigError` for an unknown backend or precision, or one the other does not take."""
    if not backends:
        raise ConfigError("no backend", f"Name one or more of: {', '.join(BACKENDS)}.")
    for backend in backends:
        if backend not in BACKENDS:
            raise ConfigError(f"unknown backend {backend!r}", nearest(backend, BACKENDS))
    known = get_args(Precision)
    if precision is not None and precision not in known:
        raise ConfigError(f"unknown precision {precision!r}", nearest(precision, known))
    if precision == "bf16" and "onnxruntime" in backends:
        raise ConfigError(
            "ONNX Runtime does not compute in bf16 on a CPU",
            "Take --precision fp32 or fp16, or name another --backend.",
        )


def coarser(one: Precision, other: Precision) -> Precision:
    """The one of two precisions with fewer digits: what an engine over a graph can be held to."""
    return max(one, other, key=_COARSENESS.index)


def graph_precision(
    component: str, backends: Sequence[str], precision: Precision | None
) -> Precision:
    """The precision of ``component``'s ONNX graph in the bundle.

    fp32 unless fp16 is asked for, or nothing is and only GPU backends are: they compile what the
    graph says, portable ones choose for themselves (bf16 is OpenVINO's choice, or a GPU build's).
    """
    portable = any(backend in PORTABLE_BACKENDS for backend in backends)
    if component in HALVED and (precision == "fp16" or (precision is None and not portable)):
        return "fp16"
    return "fp32"


def engine_precision(
    component: str, backend: str, *, graph: Precision, precision: Precision | None
) -> Precision | None:
    """What ``backend`` is asked to compute ``component`` in; None leaves it to the backend.

    Raises `ConfigError` where the bundle's graph has already lost what is asked for.
    """
    if backend == "onnxruntime":
        return None
    if backend == "openvino":
        return "bf16" if precision == "bf16" and component != "safety_checker" else "fp32"
    if component not in HALVED:
        return "fp32"
    wanted = precision or "fp16"
    if graph != "fp32" and wanted != graph:
        raise ConfigError(
            f"the bundle's {component} is {graph}; {wanted} cannot be made of it",
            f"Export the checkpoint again with --precision {wanted}.",
        )
    return wanted
