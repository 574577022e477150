"""What a graph of OpenVINO's says of itself when it is asked node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def nodes_and_inputs(model: Any) -> Iterator[tuple[Any, set[str]]]:
    """Every node of ``model``, those it reads first, and by name the inputs that it depends on."""
    seen: dict[str, set[str]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Parameter":
            inputs = set(node.output(0).get_names())
        else:
            sources = (port.get_source_output().get_node() for port in node.inputs())
            inputs = set().union(*(seen[source.get_friendly_name()] for source in sources))
        seen[node.get_friendly_name()] = inputs
        yield node, inputs
