"""Solvers of the diffusion ODE and SDE, one short function per paper, except the exponential ones.

Each yields one update per UNet call, as a linear form of the sample, the converted model outputs
and the noise (`linear_form`). What the outputs are converted to — x₀, ε, or nothing — is the
caller's to say; every docstring names what its solver expects.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sd_runtime.linear_form import NOISE, SAMPLE, Form, history, rewind, substitute, weighted_sum
from sd_runtime.noise_schedule import Level, level_from_sigma

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray


def transfer(x: Form, epsilon: Form, source: Level, target: Level) -> Form:
    """Move ``x`` between levels with ε held fixed.

    Song et al. 2020 (DDIM, arXiv:2010.02502), equation 12 with eta = 0; in the scale of Karras et
    al. one Euler step, and in that of Liu et al. (PNDM, arXiv:2202.09778) equation 11.
    """
    scale = target.alpha / source.alpha
    return scale * x + (target.sigma - scale * source.sigma) * epsilon


def ancestral_sigma(source: Level, target: Level) -> np.float64:
    """Noise that a full ancestral step adds: DDIM (arXiv:2010.02502), equation 16 with eta = 1."""
    shrink = target.noise_to_signal / source.noise_to_signal
    return np.float64(target.sigma * np.sqrt(1 - shrink**2))


def ddim(steps: Iterable[tuple[Level, Level]], *, eta: float) -> Iterator[Form]:
    """Song et al. 2020 (arXiv:2010.02502), equation 12, on x₀.

    Also Euler (eta = 0) and Euler ancestral (eta = 1) of Karras et al. 2022 and k-diffusion, which
    differ from it in the grid alone.
    """
    x0 = history(0)
    for source, target in steps:
        std = eta * ancestral_sigma(source, target)
        epsilon = (SAMPLE - source.alpha * x0) / source.sigma
        direction = np.sqrt(target.sigma**2 - std**2)
        yield target.alpha * x0 + direction * epsilon + std * NOISE


def ddpm(steps: Iterable[tuple[Level, Level]], *, fixed_large: bool) -> Iterator[Form]:
    """Ho et al. 2020 (arXiv:2006.11239), equation 7, on x₀; variance β̃ₜ, or βₜ (fixed_large)."""
    x0 = history(0)
    for source, target in steps:
        scale = source.alpha / target.alpha
        beta = 1 - scale**2
        kept = (target.sigma / source.sigma) ** 2
        std = np.sqrt(beta) if fixed_large else ancestral_sigma(source, target)
        yield target.alpha * beta / source.sigma**2 * x0 + scale * kept * SAMPLE + std * NOISE


def lcm(steps: Iterable[tuple[float, Level]], *, timestep_scaling: float) -> Iterator[Form]:
    """Luo et al. 2023 (latent consistency models, arXiv:2310.04378), algorithm 3, on x₀.

    ``steps`` are (timestep, target level); the last target is (1, 0).
    """
    sigma_data = 0.5
    for timestep, target in steps:
        scaled = timestep * timestep_scaling
        skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        out = scaled / np.sqrt(scaled**2 + sigma_data**2)
        yield target.alpha * (out * history(0) + skip * SAMPLE) + target.sigma * NOISE


def tcd(steps: Iterable[tuple[Level, Level, Level]]) -> Iterator[Form]:
    """Zheng et al. 2024 (trajectory consistency, arXiv:2402.19159), algorithm 4, on x₀.

    ``steps`` are (source, intermediate, target): denoised to the intermediate level, noised anew up
    to the target.
    """
    for source, intermediate, target in steps:
        epsilon = (SAMPLE - source.alpha * history(0)) / source.sigma
        denoised = intermediate.alpha * history(0) + intermediate.sigma * epsilon
        scale = target.alpha / intermediate.alpha
        yield scale * denoised + np.sqrt(1 - scale**2) * NOISE


def heun(levels: Iterable[Level]) -> Iterator[Form]:
    """Karras et al. 2022 (arXiv:2206.00364), algorithm 1, on ε; one Euler step to sigma = 0."""
    epsilon, previous_epsilon = history(0), history(1)
    for source, target in pairwise(levels):
        euler = transfer(SAMPLE, epsilon, source, target)
        yield euler
        if target.sigma > 0:
            yield transfer(rewind(euler), (epsilon + previous_epsilon) / 2, source, target)


class MidpointStep(NamedTuple):
    """From ``source`` by way of ``middle`` to ``target``, then noise of ``std`` on top."""

    source: Level
    middle: Level
    target: Level
    std: np.float64


def midpoint_step(source: Level, target: Level, *, ancestral: bool) -> MidpointStep:
    """Stages of k-diffusion's ``sample_dpm_2`` and ``_ancestral``: middle in log sigma."""
    std = ancestral_sigma(source, target) if ancestral else np.float64(0)
    down = Level(target.alpha, np.sqrt(target.sigma**2 - std**2))
    middle = level_from_sigma(np.sqrt(source.noise_to_signal * down.noise_to_signal))
    return MidpointStep(source, middle, down, std)


def dpm2(steps: Iterable[MidpointStep]) -> Iterator[Form]:
    """DPM-Solver-2 in the scale of Karras et al. 2022 (arXiv:2206.00364, algorithm 2), on ε."""
    for source, middle, target, std in steps:
        first = transfer(SAMPLE, history(0), source, middle)
        yield first
        if target.sigma > 0:
            yield transfer(rewind(first), history(0), source, target) + std * NOISE


def lms(levels: Sequence[Level], *, begin: int) -> Iterator[Form]:
    """Linear multistep of order 4 over Karras et al.'s sigmas, on ε. k-diffusion, ``sample_lms``.

    A run that begins late weighs the outputs it lacks, and drops them: diffusers does.
    """
    sigmas = [level.noise_to_signal for level in levels]
    for i in range(begin, len(levels) - 1):
        nodes = [sigmas[i - age] for age in range(min(i + 1, 4))]
        weights = adams_weights(nodes, sigmas[i], sigmas[i + 1])[: i + 1 - begin]
        slope = weighted_sum(weights, map(history, range(len(weights))))
        yield levels[i + 1].alpha * (SAMPLE / levels[i].alpha + slope)


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights by number of outputs at equal distances, newest first; ℏ of PNDM, equation 9."""


def pndm(
    warm_up: Sequence[int],
    timesteps: Sequence[int],
    *,
    stride: int,
    level_at: Callable[[int], Level],
    epsilon_from: Callable[[Form, Form, Level], Form],
) -> Iterator[Form]:
    """Liu et al. 2022 (PNDM, arXiv:2202.09778), algorithm 2, on the unconverted model output.

    ``warm_up``: timesteps of the Runge-Kutta rows, four to a step. Without any, the first step is
    taken twice instead (PLMS, as CompVis' Stable Diffusion samples). ``epsilon_from(sample,
    output, level)`` converts an output after it was averaged, as diffusers does.
    """

    def update(output: Form, source: int, target: int) -> Form:
        at = level_at(source)
        return transfer(SAMPLE, epsilon_from(SAMPLE, output, at), at, level_at(target))

    start = SAMPLE
    kept = list(range(0, len(warm_up), 4))  # rows whose output the multistep part uses
    for row, timestep in enumerate(warm_up):
        stage = row % 4
        output = history(0)
        if stage == 0:
            start = SAMPLE
        if stage == 3:
            output = (history(0) + 2 * history(1) + 2 * history(2) + history(3)) / 6
        target = timestep if stage % 2 else timestep - stride // 2
        step = update(output, warm_up[row - stage], target)
        yield substitute(step, start)
        start = rewind(step)

    start = SAMPLE
    for row, timestep in enumerate(timesteps, start=len(warm_up)):
        if row == 1:
            step = update((history(0) + history(1)) / 2, timestep + stride, timestep)
            yield substitute(step, start)
            continue
        kept = [*kept[-3:], row]
        weights = ADAMS_BASHFORTH[len(kept) - 1]
        output = weighted_sum(weights, [history(row - past) for past in reversed(kept)])
        step = update(output, timestep, timestep - stride)
        yield step
        start = rewind(step)


def adams_weights(
    nodes: Sequence[np.float64], start: np.float64, end: np.float64, *, rate: float = 0.0
) -> NDArray[np.float64]:
    """Weights wₖ = ∫ exp(rate·u) Lₖ(u) du from ``start`` to ``end`` of an Adams method.

    Lₖ are the Lagrange polynomials on ``nodes``. Gauss-Legendre quadrature with 24 points, which
    is exact to rounding for the lengths that occur.
    """
    points, weights = _gauss_legendre()
    half = (end - start) / 2
    u = start + half * (1 + points)
    measure = half * weights * np.exp(rate * u)
    integrals = []
    for k, node in enumerate(nodes):
        lagrange = np.ones_like(u)
        for other in (*nodes[:k], *nodes[k + 1 :]):
            lagrange = lagrange * (u - other) / (node - other)
        integrals.append(lagrange @ measure)
    return np.array(integrals, np.float64)


@cache
def _gauss_legendre() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    points, weights = np.polynomial.legendre.leggauss(24)
    return points, weights
