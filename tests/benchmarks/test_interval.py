"""The intervals against scipy's, and against what they promise to cover."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binom, bootstrap, quantile_test

from sd_bench.interval import (
    block_length,
    circular_blocks,
    median_difference_interval,
    median_interval,
)

RNG = np.random.default_rng(3)
VALUES = RNG.lognormal(0.0, 0.1, 61)


@pytest.mark.parametrize("count", [8, 24, 61])
def test_an_interval_is_scipys_where_order_statistics_are_as_sure(count: int) -> None:
    """Elsewhere it lies between the two that scipy gives for the next confidences."""
    values = VALUES[:count]

    def peer(confidence: float) -> tuple[float, float]:
        found = quantile_test(values, q=0, p=0.5).confidence_interval(confidence)
        return found.low, found.high

    sure = [1 - 2 * binom.cdf(below, count, 0.5) for below in range(count // 2)]
    for more, less in pairwise(confidence for confidence in sure if 0.5 < confidence < 0.9999):
        ours = median_interval(values, confidence=less)
        assert ours.value == np.median(values)
        assert (ours.low, ours.high) == pytest.approx(peer(less - 1e-9))
        between = median_interval(values, confidence=(more + less) / 2)
        assert peer(more - 1e-9)[0] < between.low < ours.low
        assert ours.high < between.high < peer(more - 1e-9)[1]


def test_so_few_values_that_none_is_sure_give_all_they_span() -> None:
    interval = median_interval([3.0, 1.0, 2.0], confidence=0.98)
    assert (interval.low, interval.value, interval.high) == (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        median_interval([], confidence=0.98)


def test_blocks_are_runs_of_neighbours_and_cover_all_places_alike() -> None:
    indices = circular_blocks(26, resamples=4000, rng=np.random.default_rng(0))
    assert indices.shape == (4000, 26)
    assert block_length(26) == 5
    steps = np.diff(indices[:, :25].reshape(-1, 5), axis=1) % 26
    assert (steps == 1).all()
    counts = np.bincount(indices.ravel(), minlength=26)
    assert counts == pytest.approx(np.full(26, 4000), rel=0.1)


def test_a_difference_of_medians_without_dependence_is_scipys() -> None:
    base, new = VALUES, 1.1 * RNG.lognormal(0.0, 0.1, 61)
    ours = median_difference_interval(base, new, confidence=0.9, resamples=20_000)
    peer = bootstrap(
        (new, base),
        lambda x, y, axis: np.median(x, axis=axis) - np.median(y, axis=axis),
        confidence_level=0.9,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ours.value == np.median(new) - np.median(base)
    assert ours.high - ours.low == pytest.approx(peer.high - peer.low, rel=0.3)
    assert ours.low < ours.value < ours.high
    with pytest.raises(ValueError, match="no values"):
        median_difference_interval([], new, confidence=0.9)


def test_blocks_widen_the_interval_of_what_drifts() -> None:
    drift = np.sin(np.arange(100) / 12)
    shuffled = np.random.default_rng(0).permutation(drift)
    level = np.zeros(100)

    def width(values: np.ndarray) -> float:
        interval = median_difference_interval(level, values, confidence=0.9)
        return interval.high - interval.low

    assert width(drift) > 1.5 * width(shuffled)


@pytest.mark.parametrize("count", [8, 24, 60])
def test_either_bound_misses_as_often_as_it_says(count: int) -> None:
    """Of values that are only ever disturbed upwards; 40 of 4000 ± 3 standard deviations."""
    rng = np.random.default_rng(7)
    intervals = [median_interval(rng.exponential(size=count), confidence=0.98) for _ in range(4000)]
    assert 21 <= sum(interval.low > np.log(2) for interval in intervals) <= 59
    assert 21 <= sum(interval.high < np.log(2) for interval in intervals) <= 59
