"""Intervals of medians, for samples that are not normal and depend on their neighbours.

What disturbs a machine only ever makes it slower, so latencies are not normal; it warms up, a
neighbour comes and goes, so they are not independent. The median cares little for the first. Pairs
of neighbours cancel most of the second; of what is no pair, samples are drawn in runs of
neighbours, never one by one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Values: TypeAlias = Sequence[float] | NDArray[np.float64]

RESAMPLES: Final = 2000
SEED: Final = 20_261_120
"""The same samples give the same interval in every run."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its interval, in the estimate's unit."""

    value: float
    low: float
    high: float


def median_interval(values: Values, *, confidence: float) -> Interval:
    """The median of ``values`` and its two-sided interval, between order statistics.

    However they are distributed, how many of n lie below the true median is binomial; between the
    two order statistics whose confidences lie around the one asked for, the bound is interpolated
    (Hettmansperger and Sheather 1986). So few that none is as sure give all that they span. Raises
    `ValueError` for none.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count, tail = len(ordered), (1 - confidence) / 2
    if not count:
        raise ValueError("no values have no median")
    median = float(np.median(ordered))
    # Entry k: how likely it is that the true median lies below ordered[k].
    misses = list(accumulate(math.comb(count, below) / 2**count for below in range(count)))
    inner = bisect_right(misses, tail)  # the first that is not sure enough, and the last before it
    if inner == 0:
        return Interval(median, float(ordered[0]), float(ordered[-1]))
    outer = inner - 1
    share = (tail - misses[outer]) / (misses[inner] - misses[outer])
    weight = (count - inner) * share / (inner + (count - 2 * inner) * share)
    low, high = (
        float(side[outer] + weight * (side[inner] - side[outer]))
        for side in (ordered, ordered[::-1])
    )
    return Interval(median, low, high)


def median_difference_interval(
    base: Values, new: Values, *, confidence: float, resamples: int = RESAMPLES
) -> Interval:
    """median(``new``) − median(``base``) and its two-sided bootstrap interval (Efron 1979).

    Each side is drawn anew in circular blocks of `block_length` (Politis and Romano 1992), so
    that a drift within a block stays in it. Raises `ValueError` for an empty side.
    """
    rng = np.random.default_rng(SEED)
    sides = [np.asarray(side, dtype=np.float64) for side in (new, base)]
    if not all(map(len, sides)):
        raise ValueError("a side has no values")
    medians = [
        np.median(side[circular_blocks(len(side), resamples=resamples, rng=rng)], axis=1)
        for side in sides
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians[0] - medians[1], [tail, 1 - tail])
    return Interval(float(np.median(sides[0]) - np.median(sides[1])), float(low), float(high))


def block_length(count: int) -> int:
    """√n: longer than most of a machine's moods, short enough to leave √n blocks."""
    return max(1, round(math.sqrt(count)))


def circular_blocks(count: int, *, resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices int64 [resamples, count]: runs of `block_length` neighbours, the last before 0."""
    length = block_length(count)
    starts = rng.integers(0, count, (resamples, -(-count // length), 1))
    indices = (starts + np.arange(length)) % count  # [r, blocks, length]
    return indices.reshape(resamples, -1)[:, :count]
