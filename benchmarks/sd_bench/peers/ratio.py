"""How many times slower, judged in pairs: what both met in the same round cancels out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """Median of the paired ratios, above 1 where theirs is slower, and its 95 % interval.

    ``low`` and ``high`` are None for fewer than 6 pairs, which cannot give one.
    """

    median: float
    low: float | None
    high: float | None


def paired_ratio(theirs_ms: Sequence[float], ours_ms: Sequence[float]) -> Ratio:
    """How much slower theirs is, round by round; `ValueError` where the rounds make no pairs.

    The interval is that of the sign test (order statistics, exact whatever the distribution), on
    the logarithms.
    """
    from scipy.stats import quantile_test

    if len(theirs_ms) != len(ours_ms) or not ours_ms:
        raise ValueError(f"{len(theirs_ms)} and {len(ours_ms)} rounds make no pairs")
    logs = np.log(np.asarray(theirs_ms) / np.asarray(ours_ms))
    interval = quantile_test(logs, q=0.0, p=0.5).confidence_interval(_CONFIDENCE)
    return Ratio(math.exp(np.median(logs)), _finite_exp(interval.low), _finite_exp(interval.high))


def _finite_exp(value: float) -> float | None:
    return math.exp(value) if math.isfinite(value) else None
