"""A graph as OpenVINO compiles it: for fixed shapes, in the precision asked for and no other.

It is two where a part of it is the same on every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sd_engines.backends.openvino_norms import keep_channels_last
from sd_engines.backends.openvino_package import core
from sd_engines.backends.openvino_precision import DEVICE, computes_in_8_bits, precision_hint
from sd_engines.backends.openvino_steady import part_steady
from sd_engines.border import MEMORY_HINT
from sd_engines.errors import BackendError
from sd_engines.spec import LOW_RES_LATENTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sd_engines.entries import EngineEntry

_IMAGES = "images"
"""Border of graphs that look at pictures or paint them, whose tensors are wide and of few channels;
a UNet gains nothing by `keep_channels_last`."""
_NO_SNIPPETS = {"SNIPPETS_MODE": "DISABLE"}
"""OpenVINO 2026.4 crashes where it generates code for the norms of k-diffusion's blocks, of which a
latent upscaler's UNet is made."""


class Compiled(NamedTuple):
    """``moving`` runs on every step; the outputs of ``steady``, where there is one, go into it."""

    moving: Any
    steady: Any | None


def compiled(
    model: Any,
    shapes: Mapping[Any, tuple[int, ...]],
    borders: frozenset[str],
    engine: EngineEntry,
    *,
    threads: int,
) -> Compiled:
    """``openvino.CompiledModel`` of ``model``, whose input ports take ``shapes`` from here on.

    ``borders`` are the names of its inputs and outputs. `BackendError` where OpenVINO refuses it,
    or computes in another precision than ``engine`` says.
    """
    hint = precision_hint(engine)
    try:
        model.reshape(shapes)
        if _IMAGES in borders:
            keep_channels_last(model)
        moving, steady = part_steady(model)
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": hint,
            "EXECUTION_MODE_HINT": "ACCURACY",
            # Two pinned processes on one machine would share the same few cores.
            "ENABLE_CPU_PINNING": False,
            **(_NO_SNIPPETS if LOW_RES_LATENTS in borders else {}),
        }
        made = core().compile_model(moving, DEVICE, options)
        beside = None if steady is None else core().compile_model(steady, DEVICE, options)
    except Exception as error:
        raise BackendError(f"OpenVINO cannot compile the graph: {error}", MEMORY_HINT) from error
    found = made.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if found != hint:
        raise BackendError(
            f"OpenVINO computes in {found}, not in {hint} as asked",
            "Make the engine for another backend: sd-export build BUNDLE --backend onnxruntime",
        )
    if engine.precision == "int8" and not computes_in_8_bits(made):
        raise BackendError(
            "OpenVINO computes nothing of the graph in int8 on this processor",
            "Name another precision: --precision fp32.",
        )
    return Compiled(made, beside)
