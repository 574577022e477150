"""Convolutions by Winograd's filtering give what they always gave, from half the products."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from openvino_models import compiled, kinds, laid_out_anew
from sd_engines.backends import openvino_precision
from sd_engines.backends.openvino_package import package
from sd_engines.backends.openvino_precision import products_are_scarce
from sd_engines.backends.openvino_winograd import halve_products
from sd_engines.entries import EngineEntry

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHANNELS, SIDE = 352, 32
RANDOM = np.random.default_rng(7)
WEIGHT = RANDOM.standard_normal((CHANNELS, CHANNELS, 3, 3), np.float32) / np.float32(56)
BIAS = RANDOM.standard_normal((1, CHANNELS, 1, 1), np.float32)
ENGINE = EngineEntry(
    component="unet",
    backend="openvino",
    version="1",
    target="cpu",
    precision="fp32",
    file="unet/model.onnx",
    sha256="",
    bytes=0,
    flags={},
    key="",
)


def convolving(
    weight: NDArray[np.float32] = WEIGHT,
    *,
    height: int = SIDE,
    width: int = SIDE,
    stride: int = 1,
    pad: int = 1,
) -> Any:
    """A convolution of any batch, its bias, a number for each row and channel, and a picture."""
    ops = package().opset13
    pixels = ops.parameter([-1, weight.shape[1], height, width], np.float32, name="pixels")
    embedding = ops.parameter([-1, weight.shape[0], 1, 1], np.float32, name="embedding")
    strides, pads = [stride, stride], [pad, pad]
    values = ops.convolution(pixels, ops.constant(weight), strides, pads, pads, [1, 1])
    values = ops.add(values, ops.constant(BIAS[:, : len(weight)]))
    values = ops.add(embedding, values)
    return package().Model([ops.relu(values)], [pixels, embedding])


def exact(pixels: NDArray[np.float32], embedding: NDArray[np.float32]) -> NDArray[np.float64]:
    """By torch in float64."""
    values, weight, bias = (torch.from_numpy(a).double() for a in (pixels, WEIGHT, BIAS.ravel()))
    convolved = torch.nn.functional.conv2d(values, weight, bias, padding=1)
    return (convolved + torch.from_numpy(embedding).double()).relu().numpy()


@pytest.mark.parametrize(("height", "width", "rows"), [(SIDE, SIDE, 2), (20, 56, 1)])
def test_it_gives_what_it_gave(height: int, width: int, rows: int) -> None:
    model = convolving(height=height, width=width)
    pixels = RANDOM.standard_normal((rows, CHANNELS, height, width), np.float32)
    embedding = RANDOM.standard_normal((rows, CHANNELS, 1, 1), np.float32)
    before = compiled(model)([pixels, embedding])[0]
    halve_products(model)
    after, reference = compiled(model)([pixels, embedding])[0], exact(pixels, embedding)
    assert kinds(model).count("Convolution") == 6
    error, unavoidable = (np.linalg.norm(each - reference) for each in (after, before))
    assert unavoidable < error < 4 * unavoidable < 4e-6 * np.linalg.norm(reference)


def test_half_the_products_are_left() -> None:
    model = convolving()
    halve_products(model)
    layers = (node for node in model.get_ops() if node.get_type_name() == "Convolution")
    products = sum(
        np.prod(layer.get_output_partial_shape(0)[2:].to_shape())
        * np.prod(layer.get_input_shape(1))
        for layer in layers
    )
    assert 2 * products == SIDE * SIDE * WEIGHT.size


def test_what_is_added_to_a_channel_is_added_on_the_way() -> None:
    model = convolving()
    halve_products(model)
    last = model.get_results()[0].input_value(0).get_node()
    assert last.get_type_name() == "Relu"
    assert last.input_value(0).get_node().get_type_name() == "ShuffleChannels"


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, CHANNELS, SIDE, SIDE), id="a residual connection"),
        pytest.param((1, CHANNELS, SIDE, 1), id="a number for each row"),
        pytest.param((1, CHANNELS, 1, SIDE), id="a number for each column"),
        pytest.param((SIDE, SIDE), id="no channels"),
    ],
)
def test_what_is_added_to_a_pixel_is_added_behind(shape: tuple[int, ...]) -> None:
    ops = package().opset13
    pixels = ops.parameter([1, CHANNELS, SIDE, SIDE], np.float32)
    values = ops.convolution(pixels, ops.constant(WEIGHT), [1, 1], [1, 1], [1, 1], [1, 1])
    values = ops.add(values, ops.constant(RANDOM.standard_normal(shape, np.float32)))
    assert_as_before(package().Model([values], [pixels]))


def test_values_that_are_read_twice_are_computed_once() -> None:
    ops = package().opset13
    pixels = ops.parameter([1, CHANNELS, SIDE, SIDE], np.float32)
    values = ops.convolution(pixels, ops.constant(WEIGHT), [1, 1], [1, 1], [1, 1], [1, 1])
    one, other = (ops.add(values, ops.constant(number * BIAS)) for number in (1, -3))
    assert_as_before(package().Model([ops.multiply(one, other)], [pixels]))


def assert_as_before(model: Any) -> None:
    """One picture comes out as it did, of six convolutions where one was."""
    pixels = RANDOM.standard_normal((1, CHANNELS, SIDE, SIDE), np.float32)
    before = compiled(model.clone())(pixels)[0]
    halve_products(model)
    after = compiled(model)(pixels)[0]
    assert kinds(model).count("Convolution") == 6
    assert np.linalg.norm(after - before) < 4e-6 * np.linalg.norm(before)


def test_nothing_is_laid_out_anew_between_convolutions() -> None:
    ops = package().opset13
    pixels = ops.parameter([1, CHANNELS, SIDE, SIDE], np.float32)
    values = pixels
    for weight, pad in ((WEIGHT[..., :1, :1], 0), (WEIGHT, 1), (WEIGHT, 1)):
        values = ops.convolution(values, ops.constant(weight), [1, 1], [pad] * 2, [pad] * 2, [1, 1])
    model = package().Model([values], [pixels])
    halve_products(model)
    large = [s for s in laid_out_anew(model) if np.prod(s) >= CHANNELS * SIDE * SIDE // 4]
    assert len(large) == 2  # to channels last, and back


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(convolving(WEIGHT[..., :1, :1], pad=0), id="1×1"),
        pytest.param(convolving(WEIGHT[..., :1, :1]), id="1×1 with a border"),
        pytest.param(convolving(stride=2), id="every second pixel"),
        pytest.param(convolving(pad=0), id="no border"),
        pytest.param(convolving(height=34), id="a height that is no multiple of four"),
        pytest.param(convolving(height=28), id="few pixels"),
        pytest.param(convolving(WEIGHT[:8], height=512, width=512), id="few channels"),
        pytest.param(convolving(WEIGHT[:64, :64]), id="few products"),
    ],
)
def test_what_gains_nothing_stays_whole(model: Any) -> None:
    before = kinds(model)
    halve_products(model)
    assert kinds(model) == before


def test_weights_that_are_no_constant_stay() -> None:
    ops = package().opset13
    pixels = ops.parameter([1, CHANNELS, SIDE, SIDE], np.float32)
    weight = ops.parameter([*WEIGHT.shape], np.float32)
    convolved = ops.convolution(pixels, weight, [1, 1], [1, 1], [1, 1], [1, 1])
    model = package().Model([convolved], [pixels, weight])
    halve_products(model)
    assert kinds(model).count("Convolution") == 1


@pytest.mark.parametrize(
    ("flags", "machine", "scarce"),
    [
        ({"avx2"}, "x86_64", {"fp32", "bf16"}),
        ({"avx512f", "avx512_bf16"}, "x86_64", {"fp32", "bf16"}),
        ({"avx512f", "amx_bf16"}, "x86_64", {"fp32"}),
        (set(), "aarch64", set()),
    ],
)
def test_products_are_scarce_where_it_was_measured(
    flags: set[str], machine: str, scarce: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_precision, "_processor_flags", lambda: flags)
    monkeypatch.setattr(openvino_precision.platform, "machine", lambda: machine)
    engines = [replace(ENGINE, precision=precision) for precision in ("fp32", "bf16", "fp16")]
    assert {engine.precision for engine in engines if products_are_scarce(engine)} == scarce


def test_the_processor_tells_what_it_can() -> None:
    assert openvino_precision._processor_flags() >= {"sse2"}
