"""What a UNet computes of the prompt alone, parted from the rest: it is the same on every step.

Cross-attention multiplies the prompt with its weights for keys and values. The products are those
of the whole graph, bit for bit, computed when the prompt changes.
"""

from __future__ import annotations

from typing import Any, Final

from sd_engines.backends.openvino_graph import nodes_and_inputs
from sd_engines.backends.openvino_package import package

STEADY_INPUT: Final = "encoder_hidden_states"


def part_steady(model: Any) -> tuple[Any, Any | None]:
    """``model``, of fixed shapes, as two: one that moves, and one of what the prompt alone decides.

    The outputs of the second are further inputs of the first, by name. None, and ``model`` as it
    was, where there is nothing to part, or nothing else.
    """
    names = {name for p in model.get_parameters() if _is_prompt(p) for name in _names(p)}
    found = [
        node
        for node, inputs in nodes_and_inputs(model)
        if node.get_type_name() == "MatMul" and inputs and inputs <= names and _is_exact(node)
    ]
    if not found or len(model.get_parameters()) == 1:
        return model, None
    ops, model_class = package().opset13, package().Model
    beside = {node.get_friendly_name(): node for node in model.clone().get_ordered_ops()}
    handed_over: list[Any] = []
    results: list[Any] = []
    for product in found:
        port = product.output(0)
        parameter = ops.parameter(port.get_shape(), port.get_element_type())
        port.replace(parameter.output(0))
        handed_over.append(parameter)
        results.append(ops.result(beside[product.get_friendly_name()].output(0)))
    for number, (parameter, result) in enumerate(zip(handed_over, results, strict=True)):
        for node in (parameter, result):
            node.output(0).set_names({f"steady.{number}"})
    (prompt,) = (node for node in beside.values() if _is_prompt(node))
    kept = [p for p in model.get_parameters() if not _is_prompt(p) or _is_read(p)]
    moving = model_class(model.get_results(), [*kept, *handed_over])
    return moving, model_class(results, [prompt])


def _is_exact(product: Any) -> bool:
    """Whether nothing is rounded where it is handed over: graphs in less compute in more."""
    name: str = product.get_output_element_type(0).get_type_name()
    return name == "f32"


def _is_prompt(node: Any) -> bool:
    return node.get_type_name() == "Parameter" and STEADY_INPUT in _names(node)


def _names(parameter: Any) -> set[str]:
    names: set[str] = parameter.output(0).get_names()
    return names


def _is_read(parameter: Any) -> bool:
    return bool(parameter.output(0).get_target_inputs())
