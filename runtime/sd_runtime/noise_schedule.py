"""How much signal and noise a sample holds at each training timestep: alphas_cumprod.

The one place where float32 is meant: checkpoints were trained, and diffusers samples, with float32
betas and running products, and their rounding is far larger than anything computed from them later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sd_engines.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


class Level(NamedTuple):
    """Signal and noise of a sample: alpha·x₀ + sigma·ε. The numbers are numpy's, so 1/0 is inf."""

    alpha: np.float64
    sigma: np.float64

    @property
    def half_log_snr(self) -> np.float64:
        """λ = log(alpha / sigma), the time of DPM-Solver; ∞ without noise."""
        return np.float64(np.log(self.alpha) - np.log(self.sigma))

    @property
    def noise_to_signal(self) -> np.float64:
        """The sigma of Karras et al. and of diffusers' ``sigmas``: sigma / alpha."""
        return self.sigma / self.alpha


def level_from_sigma(sigma: np.float64) -> Level:
    """The variance-preserving level, alpha² + sigma² = 1, of a noise-to-signal ratio."""
    alpha = 1.0 / np.sqrt(sigma**2 + 1.0)
    return Level(alpha, sigma * alpha)


@dataclass(frozen=True)
class NoiseSchedule:
    """``alphas_cumprod`` float32 [num_train_timesteps], and what stands for the one after t = 0."""

    alphas_cumprod: NDArray[np.float32]
    final_alpha_cumprod: np.float32

    @property
    def sigmas(self) -> NDArray[np.float32]:
        """Noise-to-signal ratio of every training timestep, float32, ascending."""
        sigmas: NDArray[np.float32] = np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)
        return sigmas

    def level_at(self, timestep: int) -> Level:
        """The level of a training timestep; below 0 the final one. ConfigError past the last."""
        if timestep >= len(self.alphas_cumprod):
            raise ConfigError(
                f"timestep {timestep} is past the last trained one, {len(self.alphas_cumprod) - 1}",
                "Take fewer steps, or a scheduler with timestep_spacing 'trailing'.",
            )
        alpha_cumprod = np.float64(
            self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod
        )
        return Level(np.sqrt(alpha_cumprod), np.sqrt(1 - alpha_cumprod))


def noise_schedule(config: Mapping[str, Any], *, min_alpha_cumprod: float) -> NoiseSchedule:
    """The schedule of a scheduler config.

    ``min_alpha_cumprod`` replaces the last value under rescale_betas_zero_snr, where it is 0:
    samplers that divide by alpha cannot start from none. ConfigError for an unknown beta_schedule.
    """
    betas = _betas(config)
    zero_snr = config.get("rescale_betas_zero_snr", False)
    if zero_snr:
        betas = rescale_zero_terminal_snr(betas)
    alphas_cumprod = _cumulative_product(1 - betas)
    if zero_snr:
        alphas_cumprod[-1] = min_alpha_cumprod
    final = np.float32(1.0) if config.get("set_alpha_to_one", True) else alphas_cumprod[0]
    return NoiseSchedule(alphas_cumprod, final)


def rescale_zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Betas that end in pure noise. Lin et al. 2023 (arXiv:2305.08891), algorithm 1; float32."""
    alphas_bar_sqrt = np.sqrt(_cumulative_product(1 - betas))
    first, last = alphas_bar_sqrt[0], alphas_bar_sqrt[-1]
    alphas_bar = ((alphas_bar_sqrt - last) * (first / (first - last))) ** 2
    alphas = alphas_bar.copy()
    alphas[1:] /= alphas_bar[:-1]
    return np.asarray(1 - alphas, np.float32)


def _betas(config: Mapping[str, Any]) -> NDArray[np.float32]:
    start, end = float(config["beta_start"]), float(config["beta_end"])
    num_train_timesteps = int(config["num_train_timesteps"])
    if config["trained_betas"] is not None:
        return np.asarray(config["trained_betas"], np.float32)
    match config["beta_schedule"]:
        case "linear":
            return _linspace(start, end, num_train_timesteps)
        case "scaled_linear":
            return _linspace(start**0.5, end**0.5, num_train_timesteps) ** 2
        case "squaredcos_cap_v2":
            return _cosine_betas(num_train_timesteps)
        case unknown:
            raise ConfigError(
                f"beta_schedule {unknown!r} is not supported",
                nearest(str(unknown), ("linear", "scaled_linear", "squaredcos_cap_v2")),
            )


def _cosine_betas(num_train_timesteps: int) -> NDArray[np.float32]:
    """Nichol & Dhariwal 2021 (arXiv:2102.09672), equation 17, capped at 0.999."""
    time = np.arange(num_train_timesteps + 1) / num_train_timesteps
    alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999), np.float32)


def _linspace(start: float, end: float, num: int) -> NDArray[np.float32]:
    """``torch.linspace`` to the last bit: a float32 step, counted from whichever end is nearer."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(num - 1, 1)))
    index = np.arange(num)
    upward, downward = first + step * index, last - step * (num - 1 - index)
    return np.asarray(np.where(index < max(num // 2, 1), upward, downward), np.float32)


def _cumulative_product(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    """``torch.cumprod`` on float32: accumulated in float64, stored in float32."""
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)
