"""Exponential integrators that follow a polynomial through several outputs, as Adams's methods do.

As `exponential_solvers`: each yields one update per UNet call as a linear form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sd_runtime.exponential_solvers import FEW_STEPS
from sd_runtime.linear_form import (
    LAST_NOISE,
    NOISE,
    SAMPLE,
    Form,
    history,
    rewind,
    substitute,
    weighted_sum,
)
from sd_runtime.solvers import adams_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sd_runtime.noise_schedule import Level


def deis(
    levels: Sequence[Level], *, begin: int, order: int, lower_order_final: bool
) -> Iterator[Form]:
    """Zhang & Chen 2022 (DEIS, arXiv:2204.13902), equation 14 with log-rho polynomials, on ε."""
    num_steps = len(levels) - 1
    few = lower_order_final and num_steps < FEW_STEPS
    log_rho = [-level.half_log_snr for level in levels]
    for i in range(begin, num_steps):
        this_order = min(order, i - begin + 1, num_steps - i if few else order)
        nodes = [log_rho[i - age] for age in range(this_order)]
        weights = adams_weights(nodes, log_rho[i], log_rho[i + 1], rate=1.0)
        slope = weighted_sum(weights, map(history, range(this_order)))
        yield levels[i + 1].alpha * (SAMPLE / levels[i].alpha + slope)


def sa_solver(
    levels: Sequence[Level],
    *,
    begin: int,
    taus: Sequence[float],
    predictor_order: int,
    corrector_order: int,
    predict_x0: bool,
    lower_order_final: bool,
) -> Iterator[Form]:
    """Xue et al. 2023 (SA-Solver, arXiv:2309.05019), algorithm 1; on x₀, or ε.

    ``taus``: how stochastic each step is, 0 for the ODE. Predictor and corrector of a step share
    its noise, so the older noise cancels.
    """
    num_steps = len(levels) - 1
    time = [level.half_log_snr for level in levels]

    def update(source: int, order: int, corrected: bool) -> Form:
        target, tau = levels[source + 1], taus[source]
        h = time[source + 1] - time[source]
        growth = 1 + tau**2
        newest = source + 1 if corrected else source
        nodes = [time[newest - age] for age in range(order)]
        rate = growth if predict_x0 else -1.0
        weights = adams_weights(nodes, time[source], time[source + 1], rate=rate)
        if predict_x0:
            if order == 2:  # the paper's appendix: the second order of a one-step method
                grown = growth * h
                remainder = h**2 / 2 - (grown - 1 + np.exp(-grown)) / growth**2
                reach = h if corrected else time[source] - time[source - 1]
                shift = np.exp(growth * time[source + 1]) * remainder / reach
                weights = weights + np.array([shift, -shift])
            factor = growth * target.sigma * np.exp(-(tau**2) * time[source + 1])
            decay = np.exp(-(tau**2) * h) * target.sigma / levels[source].sigma
            std = target.sigma * np.sqrt(-np.expm1(-2 * tau**2 * h))
        else:
            factor = -growth * target.alpha
            decay = target.alpha / levels[source].alpha
            std = tau * target.sigma * np.sqrt(np.expm1(2 * h))
        gradient = weighted_sum(weights, map(history, range(order)))
        noise = LAST_NOISE if corrected else NOISE
        result: Form = decay * SAMPLE + factor * gradient + std * noise
        return result

    predictor, last_order = SAMPLE, 0
    for i in range(begin, num_steps):
        sample = SAMPLE
        if i > begin:
            sample = substitute(update(i - 1, last_order, corrected=True), rewind(predictor))
        left = num_steps - i if lower_order_final else max(predictor_order, corrector_order)
        last_order = min(corrector_order, left + 1, i - begin + 2)
        predictor = update(i, min(predictor_order, left, i - begin + 1), corrected=False)
        yield substitute(predictor, sample)
