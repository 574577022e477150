"""Group normalisation is computed apart where that is sooner, and gives what it always gave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from openvino_models import compiled, kinds, laid_out_anew
from sd_engines.backends.openvino_norms import keep_channels_last
from sd_engines.backends.openvino_package import package

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGE = (2, 32, 48, 64)
CHANNELS, GROUPS, EPSILON = LARGE[1], 4, 1e-5
RANDOM = np.random.default_rng(3)
WEIGHT, BIAS = RANDOM.standard_normal((2, CHANNELS), np.float32)


def normalising(shape: tuple[int, ...]) -> Any:
    """A model that normalises groups of channels between two convolutions that change nothing."""
    ops = package().opset13
    pixels = ops.parameter(shape, np.float32, name="pixels")
    same = ops.constant(np.eye(CHANNELS, dtype=np.float32)[:, :, None, None])
    convolved = ops.convolution(pixels, same, [1, 1], [0, 0], [0, 0], [1, 1])
    norm = ops.group_normalization(convolved, WEIGHT, BIAS, GROUPS, EPSILON)
    return package().Model([ops.convolution(norm, same, [1, 1], [0, 0], [0, 0], [1, 1])], [pixels])


def expected(pixels: NDArray[np.float32]) -> NDArray[np.float64]:
    groups = pixels.astype(np.float64).reshape(len(pixels), GROUPS, -1)
    mean, variance = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
    normed = ((groups - mean) / np.sqrt(variance + EPSILON)).reshape(pixels.shape)
    return normed * WEIGHT[:, None, None] + BIAS[:, None, None]


@pytest.mark.parametrize("mean", [0, 100])
def test_it_gives_what_it_gave(mean: float) -> None:
    model = normalising(LARGE)
    pixels = RANDOM.standard_normal(LARGE, np.float32) + np.float32(mean)
    before = compiled(model)(pixels)[0]
    keep_channels_last(model)
    assert "GroupNormalization" not in kinds(model)
    after, exact = compiled(model)(pixels)[0], expected(pixels)
    assert np.abs(after - exact).max() <= max(2 * np.abs(before - exact).max(), 1e-5)


def test_nothing_is_laid_out_anew_between_convolutions() -> None:
    model = normalising(LARGE)
    assert laid_out_anew(model).count(LARGE) == 4
    keep_channels_last(model)
    assert laid_out_anew(model).count(LARGE) == 2  # to channels last, and back


def test_what_is_small_stays_whole() -> None:
    model = normalising((1, CHANNELS, 8, 8))
    keep_channels_last(model)
    assert "GroupNormalization" in kinds(model)
