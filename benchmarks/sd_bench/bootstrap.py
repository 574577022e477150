"""Intervals of medians by the bootstrap, for samples that depend on their neighbours.

Latencies are neither normal (what disturbs a machine only ever makes it slower) nor independent
(it warms up, a neighbour comes and goes). The median cares little for the first; for the second,
samples are drawn in runs of neighbours, never one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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


def median_interval(
    values: Values, *, confidence: float, group: int = 1, resamples: int = RESAMPLES
) -> Interval:
    """The median of ``values`` and its two-sided percentile interval (Efron 1979).

    ``group`` neighbours are drawn together, from the first on; a rest that fills no group only
    counts in the estimate. Raises `ValueError` for less than two groups.
    """
    values = np.asarray(values, dtype=np.float64)  # [n]
    groups = values[: len(values) // group * group].reshape(-1, group)
    if len(groups) < 2:
        raise ValueError(f"{len(values)} values are less than two groups of {group}")
    rng = np.random.default_rng(SEED)
    drawn = groups[rng.integers(0, len(groups), (resamples, len(groups)))]  # [r, n / g, g]
    return _percentiles(
        float(np.median(values)), np.median(drawn.reshape(resamples, -1), axis=1), confidence
    )


def median_difference_interval(
    base: Values, new: Values, *, confidence: float, resamples: int = RESAMPLES
) -> Interval:
    """median(``new``) − median(``base``) and its two-sided percentile interval.

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
    value = float(np.median(sides[0]) - np.median(sides[1]))
    return _percentiles(value, medians[0] - medians[1], confidence)


def block_length(count: int) -> int:
    """√n: longer than most of a machine's moods, short enough to leave √n blocks."""
    return max(1, round(math.sqrt(count)))


def circular_blocks(count: int, *, resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices int64 [resamples, count]: runs of `block_length` neighbours, the last before 0."""
    length = block_length(count)
    starts = rng.integers(0, count, (resamples, -(-count // length), 1))
    indices = (starts + np.arange(length)) % count  # [r, blocks, length]
    return indices.reshape(resamples, -1)[:, :count]


def _percentiles(value: float, draws: NDArray[np.float64], confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
