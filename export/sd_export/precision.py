"""Which component computes in which precision, decided in one place.

fp16 is for the UNet, where nearly all the time goes: the VAE overflows in it (its known black
pictures) and the text encoder's mask does too. On a GPU they are in tf32 then, by its tensor cores:
the digits of fp16, the reach of fp32. bf16 reaches as far, so OpenVINO, which converts as it
compiles, takes it for them as well. A safety checker answers yes or no, and a depth estimator looks
once: fp32.
int8 is for the UNet in OpenVINO, beside the graph that it was made of; all else is fp32 then. fp8
is for the UNet in TensorRT; all else is as usual there.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, get_args

from sd_engines.bundle import BACKENDS, PORTABLE_BACKENDS
from sd_engines.errors import ConfigError, nearest
from sd_engines.spec import LOSSY, Precision, caches_features, draws_from_text, is_halved
from sd_runtime.task import DEPTH_ESTIMATOR

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

    from sd_engines.bundle import ComponentEntry

_COARSENESS = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8")
_EXACT = ("safety_checker", DEPTH_ESTIMATOR)
"""Components that see pictures, once each; their resizing counts in whole numbers."""
QUANTIZED = ("unet",)
"""Components of which an engine in 8 bits is made where it is asked for."""


def is_quantized(inputs: Set[str]) -> bool:
    """Whether a layer that sees these ``inputs`` of the UNet is in 8 bits; but the last is not.

    What sees the sample or the timestep alone is not: a wrong digit there reaches all pixels.
    """
    return "encoder_hidden_states" in inputs or inputs >= {"sample", "timestep"}


def check_request(
    backends: Sequence[str],
    precision: str | None,
    calibration_prompts: Sequence[str] | None = None,
    workspace_bytes: int | None = None,
    *,
    target: str | None = None,
) -> None:
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
    if precision == "tf32" and not all(_is_on_gpu(backend, target) for backend in backends):
        raise ConfigError(
            "tf32 is for NVIDIA GPUs",
            "Name tensorrt, tensorrt-rtx, or of a bundle that is made: sd-export build BUNDLE "
            "--backend onnxruntime --target cuda",
        )
    others = [backend for backend in backends if backend != "openvino"]
    if precision == "int8" and others:
        raise ConfigError(
            f"int8 is for OpenVINO, not for {others[0]}",
            "Take --backend openvino alone, then add others without --precision int8: "
            f"sd-export build BUNDLE --backend {others[0]}",
        )
    if precision == "int8" and find_spec("nncf") is None:
        raise ConfigError(
            "int8 needs the package nncf, which is not installed",
            'pip install "sd-toolkit[int8]"',
        )
    if calibration_prompts is not None and (precision not in LOSSY or not calibration_prompts):
        raise ConfigError(
            "calibration prompts are for --precision int8 or fp8, at least one of them",
            "Leave --calibration-prompts out, or add one of these.",
        )
    portable = [backend for backend in backends if backend in PORTABLE_BACKENDS]
    if precision == "fp8" and portable:
        raise ConfigError(
            f"fp8 is for TensorRT, not for {portable[0]}",
            "Take --backend tensorrt or tensorrt-rtx alone; 8 bits on a processor are --backend "
            "openvino --precision int8.",
        )
    if workspace_bytes is not None and (portable or workspace_bytes < 1):
        raise ConfigError(
            f"a workspace of {workspace_bytes} bytes for {', '.join(portable or backends)}",
            "It is for tensorrt and tensorrt-rtx, and at least 1 MiB: --workspace-mib 4096",
        )


def check_quantizable(
    precision: Precision, *, graph: Precision, from_text: bool, feature_cache: bool
) -> None:
    """`ConfigError` for a UNet of which no engine in int8 or fp8 can be made and measured."""
    if precision == "int8" and graph != "fp32":
        raise ConfigError(
            f"the bundle's unet is {graph}; int8 cannot be made of it",
            "Export the checkpoint again with --backend openvino --precision int8.",
        )
    others = "bf16 or fp32" if precision == "int8" else "fp16"
    if not from_text:
        raise ConfigError(
            f"{precision} is calibrated by drawing from text alone, and this UNet takes a picture",
            f"Take --precision {others}.",
        )
    if feature_cache:
        raise ConfigError(
            f"{precision} is not for a UNet that caches its features: what its shallow one makes "
            "of features in 8 bits has not been measured",
            f"Take --precision {others}, or export a bundle without --feature-cache.",
        )


def coarser(one: Precision, other: Precision) -> Precision:
    """The one of two precisions with fewer digits: what an engine over a graph can be held to."""
    return max(one, other, key=_COARSENESS.index)


def graph_precision(
    component: str, backends: Sequence[str], precision: Precision | None
) -> Precision:
    """The precision of ``component``'s ONNX graph in the bundle.

    fp32 unless fp16 is asked for, or fp8 or nothing is and only GPU backends are: they compile what
    the graph says, portable ones choose for themselves (bf16 is OpenVINO's choice, or a GPU
    build's).
    """
    portable = any(backend in PORTABLE_BACKENDS for backend in backends)
    if is_halved(component) and (
        precision == "fp16" or (precision in (None, "fp8") and not portable)
    ):
        return "fp16"
    return "fp32"


def engine_precision(
    component: str,
    backend: str,
    *,
    entry: ComponentEntry,
    precision: Precision | None,
    target: str | None = None,
) -> Precision | None:
    """What ``backend`` is asked to compute ``component`` in; None leaves it to the backend.

    ``precision`` is one that `check_request` lets through. Raises `ConfigError` where it cannot be
    made of the graph that is ``entry``.
    """
    on_gpu = _is_on_gpu(backend, target)
    makes = _made_of(entry.precision, backend, on_gpu=on_gpu)
    if is_halved(component) and precision not in (None, *makes):
        raise ConfigError(
            f"the bundle's {component} is {entry.precision}; {precision} cannot be made of it",
            f"Export the checkpoint again with --precision {precision}.",
        )
    if backend == "onnxruntime" and not on_gpu:
        return None
    if precision in LOSSY and component in QUANTIZED:
        check_quantizable(
            precision,
            graph=entry.precision,
            from_text=draws_from_text(entry.inputs),
            feature_cache=caches_features(entry.outputs),
        )
        return precision
    if backend == "openvino":
        return "bf16" if precision == "bf16" and component not in _EXACT else "fp32"
    if component in _EXACT:
        return "fp32"
    if not is_halved(component):
        return "fp32" if precision == "fp32" else "tf32"
    if backend == "onnxruntime":
        return precision or ("tf32" if entry.precision == "fp32" else None)
    return "fp16" if precision in (None, *LOSSY) else precision


def _is_on_gpu(backend: str, target: str | None) -> bool:
    return backend not in PORTABLE_BACKENDS or (backend == "onnxruntime" and target == "cuda")


def _made_of(graph: Precision, backend: str, *, on_gpu: bool) -> tuple[Precision, ...]:
    """What ``backend`` makes of a UNet's graph in the precision ``graph``, that itself included."""
    if backend == "openvino":
        return (graph, "fp32", "bf16", "int8")  # int8 is refused where it is made
    if backend == "onnxruntime":
        return ("fp32", "tf32") if on_gpu and graph == "fp32" else (graph,)
    if graph != "fp32":
        return (graph, "fp8") if graph == "fp16" else (graph,)
    return ("fp32", "tf32", "fp16", "bf16", "fp8")
