"""What a UNet computes of the prompt alone, parted from the rest: it is the same on every step.

Cross-attention multiplies the prompt with its weights for keys and values. The products are those
of the whole graph, bit for bit, computed when the prompt changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sd_engines.backends.openvino_package import package

if TYPE_CHECKING:
    from collections.abc import Iterator

STEADY_INPUT: Final = "encoder_hidden_states"


def part_steady(model: Any) -> tuple[Any, Any | None]:
    """``model``, of fixed shapes, as two: one that moves, and one of what the prompt alone decides.

    The outputs of the second are further inputs of the first, by name. None, and ``model`` as it
    was, where there is nothing to part, or nothing else.
    """
    found = list(_steady_products(model))
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


def _steady_products(model: Any) -> Iterator[Any]:
    """Products of matrices that see the prompt and constants, and no other of these products."""
    sees: dict[str, set[str]] = {}
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "Parameter":
            sees[name] = {STEADY_INPUT if _is_prompt(node) else name}
            continue
        sources = (port.get_source_output().get_node() for port in node.inputs())
        sees[name] = set().union(*(sees[source.get_friendly_name()] for source in sources))
        if node.get_type_name() == "MatMul" and sees[name] == {STEADY_INPUT}:
            sees[name] = {name}
            yield node


def _is_prompt(node: Any) -> bool:
    return node.get_type_name() == "Parameter" and STEADY_INPUT in node.output(0).get_names()


def _is_read(parameter: Any) -> bool:
    return bool(parameter.output(0).get_target_inputs())
