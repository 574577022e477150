"""What two lists of latencies say about a regression: PASS, FAIL, or that they cannot tell.

The ratio is new over base of the median latency, with its interval:

- FAIL: the lower bound lies beyond the allowed regression. It is slower, as surely as asked.
- PASS: the upper bound does not.
- INCONCLUSIVE: the allowed regression lies within the interval.

An allowed regression of 2.5 % is therefore not the slowdown that is caught for certain, which is
always a larger one. Pairs are measured until the interval's half width is at most half of what is
allowed, and then *a slowdown of twice what is allowed is caught*: FAIL in at least 95 of 100
runs, while two runs of one program FAIL in at most 2 of 100.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import numpy as np

from sd_bench.interval import Interval, median_difference_interval, median_interval
from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

ALLOWED_IN_PAIRS: Final = 0.025
"""Half of the 5 % that is to be caught."""
ALLOWED_APART: Final = 0.05
"""Twice as much: between two runs a machine drifts by some percent, which neither of them sees."""
CONFIDENCE: Final = 0.98
"""Two-sided: of pairs, either bound lies on the wrong side of the true ratio in 1 of 100 runs; in 2
at most where they go on until they are precise."""
FEWEST_SAMPLES: Final = 8
PAIRS_A_PROCESS: Final = 4
"""Pairs that belong together, A B, B A and again: of the same two processes, which differ from the
next two by where their memory lies and their threads run. At 10 ms a request that is some percent.
"""


class Verdict(StrEnum):
    """What a comparison comes to."""

    PASS = "PASS"  # noqa: S105 - a verdict
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """Which stage is judged, by how much it may slow down (0.025: 2.5 %), and how surely."""

    stage: str = "total"
    allowed_regression: float
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        if not 0 <= self.allowed_regression < 10:
            raise ConfigError(
                f"allowed regression {self.allowed_regression:.3%}",
                "Allow 0 % or more, but less than 1000 %.",
            )
        if not 0.5 <= self.confidence <= 0.999:
            raise ConfigError(
                f"confidence {self.confidence:.5g}", "Ask for 0.5 to 0.999; 0.98 is the default."
            )


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One stage judged. ``ratio`` is new over base, 1.05 for 5 % slower; times are medians."""

    criterion: Criterion
    base_ms: float
    new_ms: float
    ratio: Interval
    paired: bool

    @property
    def verdict(self) -> Verdict:
        """What the interval says about the allowed regression."""
        limit = 1 + self.criterion.allowed_regression
        if self.ratio.low > limit:
            return Verdict.FAIL
        return Verdict.PASS if self.ratio.high <= limit else Verdict.INCONCLUSIVE

    @property
    def precise(self) -> bool:
        """Whether the interval's half width is at most half of the allowed regression."""
        width = np.log(self.ratio.high / self.ratio.low)
        return bool(width <= np.log1p(self.criterion.allowed_regression))


def judge_pairs(
    base_ms: Sequence[float], new_ms: Sequence[float], criterion: Criterion
) -> Judgement:
    """Judge latencies taken in turns, ``base_ms[i]`` and ``new_ms[i]`` next to each other.

    Each `PAIRS_A_PROCESS` of them say one thing, their median log-ratio; of these it is the median,
    by `median_interval`. `ConfigError` for too few, `ValueError` for lists of different lengths.
    """
    check_enough(len(base_ms), len(new_ms))
    log_ratios = [float(np.log(new / base)) for base, new in zip(base_ms, new_ms, strict=True)]
    of_processes = [
        float(np.median(log_ratios[first : first + PAIRS_A_PROCESS]))
        for first in range(0, len(log_ratios), PAIRS_A_PROCESS)
    ]
    interval = median_interval(of_processes, confidence=criterion.confidence)
    return _judgement(base_ms, new_ms, criterion, interval, paired=True)


def judge_apart(
    base_ms: Sequence[float], new_ms: Sequence[float], criterion: Criterion
) -> Judgement:
    """Judge latencies of two runs, each in the order it was taken.

    The difference of the medians of the logarithms; a bootstrap of blocks, so that what drifts
    within a run widens the interval. What differs between the runs as a whole, it cannot see.
    `ConfigError` for too few.
    """
    check_enough(len(base_ms), len(new_ms))
    interval = median_difference_interval(
        np.log(base_ms), np.log(new_ms), confidence=criterion.confidence
    )
    return _judgement(base_ms, new_ms, criterion, interval, paired=False)


def _judgement(
    base_ms: Sequence[float],
    new_ms: Sequence[float],
    criterion: Criterion,
    log_ratio: Interval,
    *,
    paired: bool,
) -> Judgement:
    value, low, high = np.exp([log_ratio.value, log_ratio.low, log_ratio.high])
    return Judgement(
        criterion=criterion,
        base_ms=float(np.median(base_ms)),
        new_ms=float(np.median(new_ms)),
        ratio=Interval(float(value), float(low), float(high)),
        paired=paired,
    )


def check_enough(*counts: int) -> None:
    """`ConfigError` where one of the sides has too few samples."""
    fewest = min(counts)
    if fewest < FEWEST_SAMPLES:
        raise ConfigError(
            f"{fewest} samples are too few to judge by",
            f"Take {FEWEST_SAMPLES} or more; 40 tell much more: sd-bench latency BUNDLE --runs 40.",
        )
