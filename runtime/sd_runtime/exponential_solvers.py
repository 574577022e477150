"""Exponential integrators of the diffusion ODE and SDE: they solve the linear part exactly.

As `solvers`: each yields one update per UNet call as a linear form. Levels are all of the grid,
``begin`` is the first step to take; orders rise from one there, whatever came before it.
"""

from __future__ import annotations

from math import factorial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from sd_runtime.linear_form import (
    NOISE,
    SAMPLE,
    Form,
    history,
    rewind,
    substitute,
    weighted_sum,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from sd_runtime.noise_schedule import Level

Algorithm: TypeAlias = Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]
FEW_STEPS = 15
"""Below this many steps ``lower_order_final`` takes effect (Lu et al. 2022b, appendix)."""


class Interval(NamedTuple):
    """One step of an exponential integrator: x' = decay·x − scale·∫… over ``u``, noise ``std``.

    The four algorithms differ in these numbers only: "++" integrates x₀, the others ε.
    """

    decay: np.float64
    scale: np.float64
    u: np.float64
    std: np.float64


def interval(algorithm: Algorithm, source: Level, target: Level) -> Interval:
    """Lu et al. 2022 (arXiv:2206.00927) equation 3.4, and 2022b (arXiv:2211.01095) 8 and 14."""
    h = target.half_log_snr - source.half_log_snr
    zero = np.float64(0)
    match algorithm:
        case "dpmsolver++":
            return Interval(target.sigma / source.sigma, target.alpha, -h, zero)
        case "dpmsolver":
            return Interval(target.alpha / source.alpha, target.sigma, h, zero)
        case "sde-dpmsolver++":
            std = target.sigma * np.sqrt(-np.expm1(-2 * h))
            return Interval(target.sigma / source.sigma * np.exp(-h), target.alpha, -2 * h, std)
        case "sde-dpmsolver":
            std = target.sigma * np.sqrt(np.expm1(2 * h))
            return Interval(target.alpha / source.alpha, 2 * target.sigma, h, std)


def first_order(step: Interval, d0: Form) -> Form:
    """Update with the model output held at ``d0``. DDIM, in exact arithmetic."""
    update: Form = step.decay * SAMPLE - step.scale * np.expm1(step.u) * d0 + step.std * NOISE
    return update


def slope_term(step: Interval, d1: Form, solver_type: str) -> Form:
    """What the output's slope ``d1`` adds: "midpoint" takes it halfway, "heun" integrates it."""
    growth = np.expm1(step.u)
    weight = -growth / 2 if solver_type == "midpoint" else 1 - growth / step.u
    term: Form = step.scale * weight * d1
    return term


def curvature_term(step: Interval, d2: Form, algorithm: Algorithm) -> Form:
    """What the output's curvature ``d2`` adds, at third order.

    The constant's sign is diffusers': for the SDE it is not the paper's.
    """
    half = -0.5 if algorithm == "sde-dpmsolver++" else 0.5
    term: Form = step.scale * (half - (np.expm1(step.u) - step.u) / step.u**2) * d2
    return term


def dpm_solver_multistep(
    levels: Sequence[Level],
    *,
    begin: int,
    order: int,
    algorithm: Algorithm,
    solver_type: str,
    lower_order_final: bool,
    first_order_final: bool,
) -> Iterator[Form]:
    """Lu et al. 2022b (DPM-Solver++, arXiv:2211.01095), algorithm 2; on x₀ ("++") or ε."""
    num_steps = len(levels) - 1
    few = lower_order_final and num_steps < FEW_STEPS
    m0, m1, m2 = history(0), history(1), history(2)
    for i in range(begin, num_steps):
        this_order = min(order, i - begin + 1)
        if few:
            this_order = min(this_order, num_steps - i)
        if first_order_final and i == num_steps - 1:
            this_order = 1
        step = interval(algorithm, levels[i], levels[i + 1])
        update = first_order(step, m0)
        if this_order >= 2:
            time = [level.half_log_snr for level in levels[i - this_order + 1 : i + 2]][::-1]
            h = time[0] - time[1]
            r0 = (time[1] - time[2]) / h
            d1 = (m0 - m1) / r0
            if this_order == 2:
                update = update + slope_term(step, d1, solver_type)
            else:
                r1 = (time[2] - time[3]) / h
                d1_older = (m1 - m2) / r1
                d2 = (d1 - d1_older) / (r0 + r1)
                update = update + slope_term(step, d1 + r0 * d2, "heun")
                update = update + curvature_term(step, d2, algorithm)
        yield update


def singlestep_orders(num_steps: int, order: int, *, lower_order_final: bool) -> list[int]:
    """Orders of the steps: rising to ``order`` again and again, and low at the end."""
    rising = list(range(1, order + 1))
    if not lower_order_final:
        return rising * (num_steps // order)
    if order == 3 and num_steps % 3 == 0:
        return rising * (num_steps // 3 - 1) + [1, 2, 1]
    if order == 2 and num_steps % 2 == 0:
        return rising * (num_steps // 2 - 1) + [1, 1]
    return rising * (num_steps // order) + rising[: num_steps % order]


def dpm_solver_singlestep(
    levels: Sequence[Level],
    *,
    begin: int,
    orders: Sequence[int],
    algorithm: Algorithm,
    solver_type: str,
) -> Iterator[Form]:
    """Lu et al. 2022 (arXiv:2206.00927), algorithms 1 and 2; on x₀ ("++") or ε, the ODE only.

    A step of order n starts again from the sample of n − 1 rows ago.
    """
    start = SAMPLE
    m0, m1, m2 = history(0), history(1), history(2)
    for i in range(begin, len(levels) - 1):
        order = min(orders[i], i - begin + 1)
        time = [level.half_log_snr for level in levels[i - order + 1 : i + 2]]
        step = interval(algorithm, levels[i - order + 1], levels[i + 1])
        h = time[-1] - time[0]
        if order == 1:
            start = SAMPLE
            update = first_order(step, m0)
        elif order == 2:
            d1 = (m0 - m1) / ((time[1] - time[0]) / h)
            update = first_order(step, m1) + slope_term(step, d1, solver_type)
        else:
            r1, r0 = (time[1] - time[0]) / h, (time[2] - time[0]) / h
            near, far = (m1 - m2) / r1, (m0 - m2) / r0
            update = first_order(step, m2)
            if solver_type == "midpoint":
                update = update + slope_term(step, far, "heun")
            else:
                d1, d2 = (r0 * near - r1 * far) / (r0 - r1), 2 * (far - near) / (r0 - r1)
                update = update + slope_term(step, d1, "heun")
                update = update + curvature_term(step, d2, algorithm)
        yield substitute(update, start)
        start = rewind(update)


def uni_pc(
    levels: Sequence[Level],
    *,
    begin: int,
    order: int,
    predict_x0: bool,
    solver_type: str,
    lower_order_final: bool,
    disable_corrector: Collection[int],
) -> Iterator[Form]:
    """Zhao et al. 2023 (UniPC, arXiv:2302.04867), algorithms 5 to 8; on x₀, or ε.

    The corrector needs no extra UNet call: it redoes the last step with the new output, then the
    predictor goes on from there.
    """
    num_steps = len(levels) - 1
    algorithm: Algorithm = "dpmsolver++" if predict_x0 else "dpmsolver"

    def update(source: int, order: int, corrected: bool) -> Form:
        """One step from ``source``; outputs are ``source``'s and older, corrected: newer too."""
        step = interval(algorithm, levels[source], levels[source + 1])
        h = levels[source + 1].half_log_snr - levels[source].half_log_snr
        b_h = step.u if solver_type == "bh1" else np.expm1(step.u)
        own = 1 if corrected else 0  # age of the output at ``source``
        nodes = [
            (levels[source - k].half_log_snr - levels[source].half_log_snr) / h
            for k in range(1, order)
        ]
        slopes = [(history(own + k) - history(own)) / r for k, r in enumerate(nodes, start=1)]
        if corrected:
            nodes.append(np.float64(1))
            slopes.append(history(0) - history(1))
        result = first_order(step, history(own))
        if slopes:
            weights = _uni_pc_weights(nodes, step.u, b_h)
            result = result - step.scale * b_h * weighted_sum(weights, slopes)
        return result

    predictor, last_order = SAMPLE, 0
    for i in range(begin, num_steps):
        sample = SAMPLE
        if i > begin and i - 1 not in disable_corrector:
            sample = substitute(update(i - 1, last_order, corrected=True), rewind(predictor))
        last_order = min(order, num_steps - i) if lower_order_final else order
        last_order = min(last_order, i - begin + 1)
        predictor = update(i, last_order, corrected=False)
        yield substitute(predictor, sample)


def _uni_pc_weights(
    nodes: Sequence[np.float64], u: np.float64, b_h: np.float64
) -> list[np.float64]:
    """Solve R(nodes)·ρ = φ(u) / B(h), theorem 3.1 there; ½ for one node, as the paper advises."""
    if len(nodes) == 1:
        return [np.float64(0.5)]
    phi = np.expm1(u) / u - 1
    right = []
    for power in range(1, len(nodes) + 1):
        right.append(phi * factorial(power) / b_h)
        phi = phi / u - 1 / factorial(power + 1)
    return list(np.linalg.solve(np.vander(nodes, increasing=True).T, right))
