"""The intervals against scipy's, and against what they promise to cover."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from sd_bench.bootstrap import (
    block_length,
    circular_blocks,
    median_difference_interval,
    median_interval,
)

RNG = np.random.default_rng(3)
VALUES = RNG.lognormal(0.0, 0.1, 61)


def test_an_interval_is_scipys() -> None:
    ours = median_interval(VALUES, confidence=0.9, resamples=20_000)
    peer = bootstrap(
        (VALUES,),
        np.median,
        confidence_level=0.9,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = peer.high - peer.low
    assert ours.value == np.median(VALUES)
    assert ours.low == pytest.approx(peer.low, abs=0.05 * width)
    assert ours.high == pytest.approx(peer.high, abs=0.05 * width)


def test_groups_are_drawn_whole_as_scipy_draws_rows() -> None:
    pairs = VALUES[:40].reshape(20, 2)
    ours = median_interval(pairs.ravel(), group=2, confidence=0.9, resamples=20_000)

    def median_of_pairs(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
        return np.median(np.concatenate([first, second], axis=axis), axis=axis)

    peer = bootstrap(
        (pairs[:, 0], pairs[:, 1]),
        median_of_pairs,
        paired=True,
        vectorized=True,
        confidence_level=0.9,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = peer.high - peer.low
    assert ours.low == pytest.approx(peer.low, abs=0.05 * width)
    assert ours.high == pytest.approx(peer.high, abs=0.05 * width)


def test_a_group_of_equal_neighbours_counts_once() -> None:
    single = median_interval(VALUES, confidence=0.95)
    doubled = median_interval(np.repeat(VALUES, 2), group=2, confidence=0.95)
    assert doubled == single


def test_a_rest_that_fills_no_group_is_in_the_estimate_only() -> None:
    interval = median_interval([1.0, 1.0, 2.0, 2.0, 3.0], group=2, confidence=0.9)
    assert interval.value == 2.0
    assert interval.high <= 2.0
    with pytest.raises(ValueError, match="two groups"):
        median_interval([1.0, 2.0, 3.0], group=2, confidence=0.9)


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


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        interval = median_interval(rng.normal(size=60), confidence=0.9, resamples=500)
        covered += interval.low <= 0.0 <= interval.high
    assert 255 <= covered <= 291  # 270 ± 4 standard deviations of the count
