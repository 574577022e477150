"""Group normalisation in the layout of the convolutions around it.

OpenVINO's CPU plugin convolves with channels last and normalises groups with channels first, so
what lies between two convolutions is laid out anew twice. Means over height and width, and products
with a number a channel, are computed in either layout; of those it is made here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sd_engines.backends.openvino_package import package

if TYPE_CHECKING:
    from collections.abc import Sequence

_FEWEST_VALUES: Final = 60_000
"""A sample smaller than this is laid out sooner than its statistics are computed apart."""


def keep_channels_last(model: Any) -> None:
    """Change every large group normalisation of ``model`` in place; its shapes must be fixed."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "GroupNormalization" and _is_large(node):
            node.output(0).replace(_normalised(node).output(0))


def _is_large(node: Any) -> bool:
    shape = list(node.get_input_shape(0))
    return len(shape) == 4 and np.prod(shape[1:]) >= _FEWEST_VALUES


def _normalised(node: Any) -> Any:
    """The node's output from nodes of other kinds; its variance is that of what the mean is off."""
    ops = package().opset13
    values, weight, bias = (node.input_value(index) for index in range(3))
    channels, attributes = node.get_input_shape(0)[1], node.get_attributes()
    groups = attributes["num_groups"]

    def constant(numbers: Sequence[int]) -> Any:
        return ops.constant(np.array(numbers, np.int64))

    def mean_of_group(parts: Any) -> Any:
        """[n, c, h, w] to [n, c, 1, 1], where channels of one group have the same."""
        of_channel = ops.reduce_mean(parts, constant([2, 3]), keep_dims=True)
        grouped = ops.reshape(of_channel, constant([0, groups, -1, 1]), special_zero=True)
        of_group = ops.reduce_mean(grouped, constant([2]), keep_dims=True)
        tiled = ops.tile(of_group, constant([1, 1, channels // groups, 1]))
        return ops.reshape(tiled, constant([0, channels, 1, 1]), special_zero=True)

    centred = ops.subtract(values, mean_of_group(values))
    variance = mean_of_group(ops.multiply(centred, centred))
    deviation = ops.sqrt(ops.add(variance, ops.constant(np.float32(attributes["epsilon"]))))
    by_channel = constant([1, channels, 1, 1])
    weight, bias = (ops.reshape(part, by_channel, special_zero=False) for part in (weight, bias))
    return ops.add(ops.multiply(centred, ops.divide(weight, deviation)), bias)
