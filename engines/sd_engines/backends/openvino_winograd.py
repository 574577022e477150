"""3×3 convolutions of half the products: Winograd's minimal filtering F(4, 3), along the height.

Four rows of what a convolution gives are made of six products of transformed rows and weights, not
of twelve (Winograd 1980; Lavin & Gray 2015, arXiv:1509.09308). The transforms are sums of rows that
lie apart; they stay in the layout that convolutions want, and cost a tenth of the convolution.

Engines on a CPU compute near the most products a second that it can, so fewer of them are what is
left to gain. What is computed is the same, rounded elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sd_engines.backends.openvino_package import package

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

_ROWS: Final = 4
"""Rows of the output that one set of products makes."""
_A, _B = 3 / 4, 3 / 2
"""Polynomials are multiplied at the points 0, ±a, ±b and ∞. In bf16 these round by a third less
than 1 and 2, which are usual."""
_A2, _B2 = _A * _A, _B * _B
_FEWEST_CHANNELS: Final = 32
"""Of fewer the transforms cost more than is saved."""
_FEWEST_PIXELS: Final = 1024
"""Of fewer twice the weights to hold and to read are worth more than the little that is saved."""
_FEWEST_PRODUCTS: Final = 1_000_000_000
"""Of fewer, what is saved takes many pictures to make up for what more convolutions take to
compile."""
_ALONG_WIDTH: Final = [1, 1], [0, 1], [0, 1], [1, 1]
"""Strides, pads before and behind, and dilations of a convolution by 1×3 weights."""
_SLICED_BY_HEIGHT: Final = [1, 1, 0, 1]
_TO_THE_END: Final = [1, 1, 1, 1]


def halve_products(model: Any) -> None:
    """Change every 3×3 convolution of ``model`` that gains by it, in place.

    Its weights must be constants, and all axes fixed but the batch.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convolution" and _gains(node):
            last, addends = _with_addends(node)
            last.output(0).replace(_convolved(node, addends).output(0))


def _gains(node: Any) -> bool:
    attributes, weight = node.get_attributes(), node.input_value(1)
    steps = ("strides", "dilations", "pads_begin", "pads_end")
    if attributes["auto_pad"] != "explicit" or any(list(attributes[s]) != [1, 1] for s in steps):
        return False
    if weight.get_node().get_type_name() != "Constant":
        return False
    if weight.get_element_type().get_type_name() != "f32":
        return False
    shape, pixels = list(weight.get_shape()), node.input_value(0).get_partial_shape()
    height, width = (pixels[axis].get_length() for axis in (2, 3))
    return (
        shape[2:] == [3, 3]
        and min(shape[:2]) >= _FEWEST_CHANNELS
        and height % _ROWS == 0
        and height * width >= _FEWEST_PIXELS
        and height * width * np.prod(shape) >= _FEWEST_PRODUCTS
    )


def _with_addends(node: Any) -> tuple[Any, list[Any]]:
    """The last of the additions of one number a channel that follow ``node``, and those numbers."""
    addends: list[Any] = []
    while True:
        (user, *others) = node.output(0).get_target_inputs()
        if others or user.get_node().get_type_name() != "Add":
            return node, addends
        addend = user.get_node().input_value(1 - user.get_index())
        shape = addend.get_partial_shape()
        if shape.rank.get_length() != 4 or [str(shape[axis]) for axis in (2, 3)] != ["1", "1"]:
            return node, addends
        addends.append(addend)
        node = user.get_node()


def _convolved(node: Any, addends: Sequence[Any]) -> Any:
    """What ``node``, a convolution, and the additions of ``addends`` to it give, [n, k, h, w]."""
    ops = package().opset13
    weights = _transformed_weights(node.input_value(1).get_node().data)
    products = [
        ops.convolution(rows, ops.constant(weight, shared_memory=True), *_ALONG_WIDTH)
        for rows, weight in zip(_transformed_rows(node.input_value(0)), weights, strict=True)
    ]
    made = list(_rows_of(products))
    for addend in addends:
        made = [ops.add(rows, addend) for rows in made]
    return ops.shuffle_channels(ops.concat(made, 2), 2, _ROWS)  # it interleaves any axis, this: 2


def _transformed_rows(values: Any) -> list[Any]:
    """[n, c, h, w] to six of [n, c, h/4, w]: Bᵀ·d, d the rows −1 to 4 about every fourth."""
    ops = package().opset13
    zero = ops.constant(np.float32(0))

    def every_fourth(first: int) -> Any:
        begin, end, stride = (0, 0, first, 0), (0, 0, 0, 0), (1, 1, _ROWS, 1)
        numbers = (_numbers(*each) for each in (begin, end, stride))
        return ops.strided_slice(values, *numbers, _SLICED_BY_HEIGHT, _TO_THE_END)

    def moved(rows: Any, by: int) -> Any:
        return ops.pad(rows, _numbers(0, 0, by, 0), _numbers(0, 0, -by, 0), "constant", zero)

    own = [every_fourth(first) for first in range(_ROWS)]
    d = [moved(own[-1], 1), *own, moved(own[0], -1)]
    transformed = [_sum(d[4], (_A2 * _B2, d[0]), (-_A2 - _B2, d[2]))]
    for point, other in ((_A, _B2), (_B, _A2)):
        even, odd = _sum(d[4], (-other, d[2])), _sum(d[3], (-other, d[1]))
        transformed += [_sum(even, (point, odd)), _sum(even, (-point, odd))]
    return [*transformed, _sum(d[5], (_A2 * _B2, d[1]), (-_A2 - _B2, d[3]))]


def _transformed_weights(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """[k, c, 3, 3] to [6, k, c, 1, 3]: G·g, g the three rows of each."""
    at_a, at_b = 1 / (2 * _A2 * (_A2 - _B2)), 1 / (2 * _B2 * (_B2 - _A2))
    matrix = [
        [1 / (_A2 * _B2), 0, 0],
        *([at_a, sign * at_a * _A, at_a * _A2] for sign in (1, -1)),
        *([at_b, sign * at_b * _B, at_b * _B2] for sign in (1, -1)),
        [0, 0, 1],
    ]
    rows = np.ascontiguousarray(weight.transpose(2, 0, 1, 3)).reshape(3, -1)
    return (np.array(matrix, np.float32) @ rows).reshape(6, *weight.shape[:2], 1, 3)


def _rows_of(products: Sequence[Any]) -> Iterator[Any]:
    """Six products to the four rows that they make: Aᵀ·m."""
    ops = package().opset13
    first, *finite, last = products
    (sum_a, off_a), (sum_b, off_b) = (
        (ops.add(plus, minus), ops.subtract(plus, minus))
        for plus, minus in (finite[:2], finite[2:])
    )
    yield _sum(first, (1, sum_a), (1, sum_b))
    yield _sum(_scaled(_A, off_a), (_B, off_b))
    yield _sum(_scaled(_A2, sum_a), (_B2, sum_b))
    yield _sum(last, (_A * _A2, off_a), (_B * _B2, off_b))


def _sum(first: Any, *others: tuple[float, Any]) -> Any:
    """``first``, and each of ``others`` so many times."""
    ops = package().opset13
    for factor, other in others:
        first = ops.add(first, other if factor == 1 else _scaled(factor, other))
    return first


def _scaled(factor: float, values: Any) -> Any:
    ops = package().opset13
    return ops.multiply(values, ops.constant(np.float32(factor)))


def _numbers(*numbers: int) -> Any:
    return package().opset13.constant(np.array(numbers, np.int64))
