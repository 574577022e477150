"""Where samplers put their steps: evenly by timestep, or by noise level. All descending."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sd_engines.errors import ConfigError, nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def spaced_timesteps(
    spacing: str,
    num_steps: int,
    *,
    points: int,
    num_train_timesteps: int,
    steps_offset: int,
    clipped: int,
) -> Array:
    """The first ``num_steps`` of ``points`` timesteps, not rounded.

    Lin et al. 2023 (arXiv:2305.08891), table 2.
    ``points`` is num_steps + 1 for solvers whose grid ends at timestep 0 without a step there.
    The last ``clipped`` of the trained timesteps are not visited; "trailing" keeps its stride even
    so, and has fewer steps where it is shorter than they are.
    ConfigError for an unknown spacing.
    """
    visited = num_train_timesteps - clipped
    match spacing:
        case "linspace":
            return np.linspace(0, visited - 1, points)[::-1][:num_steps]
        case "leading":
            stride = visited // points
            return np.arange(points, dtype=np.float64)[::-1][:num_steps] * stride + steps_offset
        case "trailing":
            timesteps = np.arange(visited, 0, -num_train_timesteps / num_steps).round() - 1
            return timesteps[timesteps >= 0]  # the sums' rounding may add one below
        case unknown:
            raise ConfigError(
                f"timestep_spacing {unknown!r} is not supported",
                nearest(str(unknown), ("linspace", "leading", "trailing")),
            )


def distilled_timesteps(
    num_steps: int, *, original_inference_steps: int, num_train_timesteps: int, share: float
) -> Array:
    """Evenly skipped timesteps of the distillation grid, or of the ``share`` at its end.

    Luo et al. 2023 (arXiv:2310.04378).
    """
    points = int(original_inference_steps * share)
    if num_steps > points:
        raise ConfigError(
            f"{num_steps} steps are more than the {points} of the distillation",
            f"Take 1 to {points} steps; distilled models want about 4."
            if points
            else "Raise strength.",
        )
    stride = num_train_timesteps // original_inference_steps
    original = np.arange(points, 0, -1, dtype=np.float64) * stride - 1
    kept = np.linspace(0, len(original), num_steps, endpoint=False).astype(np.int64)
    return original[kept]


def karras_sigmas(sigma_min: float, sigma_max: float, num_steps: int) -> Array:
    """Karras et al. 2022 (arXiv:2206.00364), equation 5, rho = 7."""
    ramp = np.linspace(0, 1, num_steps)
    first, last = sigma_max ** (1 / 7.0), sigma_min ** (1 / 7.0)
    return np.asarray((first + ramp * (last - first)) ** 7.0)


def exponential_sigmas(sigma_min: float, sigma_max: float, num_steps: int) -> Array:
    """Evenly spaced in log sigma. Lu et al. 2022 (arXiv:2206.00927), section 3.3."""
    return np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), num_steps))


def beta_sigmas(sigma_min: float, sigma_max: float, num_steps: int) -> Array:
    """Quantiles of Beta(0.6, 0.6). Lee et al. 2024 (arXiv:2407.12173)."""
    quantiles = beta_quantile(1 - np.linspace(0, 1, num_steps), 0.6)
    return sigma_min + quantiles * (sigma_max - sigma_min)


def beta_quantile(probability: Array, shape: float) -> Array:
    """Inverse of the distribution function of Beta(shape, shape), shape ≤ 1, elementwise.

    The lower half from the power series of the incomplete beta function (Abramowitz & Stegun
    26.5.4), which converges there like 2**-n, by Newton's method; the upper half by symmetry.
    """
    lower = np.minimum(probability, 1 - probability)
    n = np.arange(1, 60)
    series = np.concatenate([[1.0], np.cumprod((n - shape) / n)]) / (shape + np.arange(60))
    total = 2 * 0.5**shape * np.polynomial.polynomial.polyval(0.5, series)  # B(shape, shape)
    root = (lower * total * shape) ** (1 / shape)  # from the first term; never below the answer
    for _ in range(8):
        root = np.clip(root, 1e-300, 0.5)
        excess = root**shape * np.polynomial.polynomial.polyval(root, series) - lower * total
        root -= excess * (root * (1 - root)) ** (1 - shape)
    root = np.where(lower > 0, root, 0.0)
    return np.where(probability < 0.5, root, 1 - root)


def timesteps_from_sigmas(sigmas: Array, train_sigmas: NDArray[np.float32]) -> Array:
    """The fractional training timestep of each sigma, linear in log sigma, as diffusers rounds it.

    ``train_sigmas`` float32 [num_train_timesteps], ascending; its logarithm stays float32 because
    callers truncate the result to whole timesteps.
    """
    log_sigmas, train = np.log(np.maximum(sigmas, 1e-10)), np.log(train_sigmas)
    low = np.clip(np.searchsorted(train, log_sigmas, side="right") - 1, 0, len(train) - 2)
    weight = np.clip((train[low] - log_sigmas) / (train[low] - train[low + 1]), 0, 1)
    return np.asarray((1 - weight) * low + weight * (low + 1), np.float64)
