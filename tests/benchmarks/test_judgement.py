"""Verdicts follow from the interval, and from nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import gmean

from sd_bench.interval import Interval, median_interval
from sd_bench.judgement import Criterion, Judgement, Verdict, judge_apart, judge_pairs
from sd_engines.errors import ConfigError

CRITERION = Criterion(allowed_regression=0.05)
RNG = np.random.default_rng(11)


def judgement(low: float, high: float) -> Judgement:
    ratio = Interval(float(gmean([low, high])), low, high)
    return Judgement(criterion=CRITERION, base_ms=1.0, new_ms=1.0, ratio=ratio, paired=True)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.90, 1.05, Verdict.PASS),
        (0.90, 1.06, Verdict.INCONCLUSIVE),
        (1.05, 1.06, Verdict.INCONCLUSIVE),
        (1.051, 1.06, Verdict.FAIL),
        (0.70, 0.71, Verdict.PASS),
    ],
)
def test_the_verdict_is_where_the_allowed_regression_lies(
    low: float, high: float, verdict: Verdict
) -> None:
    assert judgement(low, high).verdict is verdict


def test_precise_is_a_half_width_of_half_the_allowed() -> None:
    assert judgement(1.0, 1.0499).precise
    assert judgement(2.0, 2.0 * 1.0499).precise
    assert not judgement(1.0, 1.0501).precise


def test_pairs_cancel_what_both_sides_share() -> None:
    weather = RNG.lognormal(6, 0.5, 40)
    judged = judge_pairs(weather.tolist(), (1.07 * weather).tolist(), CRITERION)
    assert judged.ratio.low == pytest.approx(1.07)
    assert judged.ratio.high == pytest.approx(1.07)
    assert judged.verdict is Verdict.FAIL
    assert judged.new_ms == pytest.approx(1.07 * judged.base_ms)
    apart = judge_apart(weather.tolist(), (1.07 * weather).tolist(), CRITERION)
    assert apart.ratio.value == pytest.approx(1.07)
    assert apart.verdict is Verdict.INCONCLUSIVE


def test_pairs_of_one_process_count_as_one() -> None:
    luck = np.repeat(RNG.normal(0, 0.02, 10), 4)
    few = judge_pairs([1.0] * 40, np.exp(luck).tolist(), CRITERION).ratio
    of_ten = median_interval(luck[::4], confidence=CRITERION.confidence)
    assert few == Interval(*np.exp([of_ten.value, of_ten.low, of_ten.high]).tolist())
    shaken = luck + np.tile([0.0, 0.0, 0.0, 0.5], 10)  # one of four disturbed
    assert judge_pairs([1.0] * 40, np.exp(shaken).tolist(), CRITERION).ratio == few


def test_sides_swapped_give_the_reciprocal() -> None:
    base, new = RNG.lognormal(6, 0.03, 40).tolist(), RNG.lognormal(6.1, 0.03, 40).tolist()
    there, back = (judge_pairs(*sides, CRITERION).ratio for sides in ((base, new), (new, base)))
    assert there.value == pytest.approx(1 / back.value)
    assert there.low == pytest.approx(1 / back.high)
    assert there.high == pytest.approx(1 / back.low)


def test_too_few_or_unequal_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 samples"):
        judge_pairs([1.0] * 7, [1.0] * 7, CRITERION)
    with pytest.raises(ConfigError, match="7 samples"):
        judge_apart([1.0] * 40, [1.0] * 7, CRITERION)
    with pytest.raises(ValueError, match="zip"):
        judge_pairs([1.0] * 9, [1.0] * 8, CRITERION)


def test_a_criterion_has_bounds() -> None:
    with pytest.raises(ConfigError, match=r"-1\.0"):
        Criterion(allowed_regression=-0.01)
    with pytest.raises(ConfigError, match="confidence 98"):
        Criterion(allowed_regression=0.01, confidence=98)
