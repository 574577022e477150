"""Models of OpenVINO's own: compiled without rounding, and what they are made of."""

from __future__ import annotations

from typing import Any

from sd_engines.backends.openvino_package import core


def compiled(model: Any) -> Any:
    """On one thread, in float32."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return core().compile_model(model, "CPU", options)


def kinds(model: Any) -> list[str]:
    """Of its nodes, in their order."""
    return [node.get_type_name() for node in model.get_ordered_ops()]


def laid_out_anew(model: Any) -> list[tuple[int, ...]]:
    """Shapes of what is, each time that the compiled ``model`` runs."""
    executed = compiled(model).get_runtime_model().get_ops()
    reorders = [n for n in executed if n.get_rt_info()["layerType"].astype(str) == "Reorder"]
    return [tuple(node.get_output_shape(0)) for node in reorders]
