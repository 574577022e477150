"""Which timesteps a sampler visits and the noise levels between them, from a scheduler's config.

Four kinds of grid serve all classes. Sigmas (noise-to-signal ratios) are rounded to float32, where
diffusers rounds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_runtime.noise_schedule import Level, NoiseSchedule, level_from_sigma
from sd_runtime.timestep_spacing import (
    beta_sigmas,
    distilled_timesteps,
    exponential_sigmas,
    karras_sigmas,
    spaced_timesteps,
    timesteps_from_sigmas,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Grid:
    """N timesteps, float64 and descending, and the N + 1 levels before, between and after them."""

    timesteps: NDArray[np.float64]
    levels: list[Level]


def trained_grid(config: Mapping[str, Any], num_steps: int) -> list[int]:
    """Whole training timesteps, descending: DDIM, DDPM and PNDM look their levels up by them."""
    return [int(t) for t in _spaced(config, num_steps, points=num_steps).round()]


def distilled_grid(config: Mapping[str, Any], num_steps: int) -> list[int]:
    """Whole timesteps out of those that LCM and TCD models were distilled on, descending."""
    timesteps = distilled_timesteps(
        num_steps,
        original_inference_steps=config["original_inference_steps"],
        num_train_timesteps=config["num_train_timesteps"],
        share=config.get("distilled_share", 1.0),
    )
    return [int(t) for t in timesteps]


def k_diffusion_grid(config: Mapping[str, Any], schedule: NoiseSchedule, num_steps: int) -> Grid:
    """Fractional timesteps and sigmas down to 0: Euler, Heun, KDPM2 and LMS.

    diffusers keeps these samples in the scale where the signal is 1; ours rejoins it at the end,
    so the last level is (1, last sigma).
    """
    train_sigmas = schedule.sigmas
    timesteps = _spaced(config, num_steps, points=num_steps)
    sigmas = np.interp(timesteps, np.arange(len(train_sigmas)), train_sigmas)
    if config.get("interpolation_type") == "log_linear":
        first, last = np.log(train_sigmas[[-1, 0]])
        sigmas = np.exp(np.linspace(first, last, num_steps + 1))
    respaced = _respaced(config, sigmas, num_steps)
    if respaced is not None:
        sigmas, timesteps = respaced, timesteps_from_sigmas(respaced, train_sigmas)
        if config["use_karras_sigmas"] and config["_class_name"].startswith("KDPM2"):
            timesteps = timesteps.round()
    final = train_sigmas[0] if config.get("final_sigmas_type") == "sigma_min" else 0.0
    sigmas = _rounded(np.append(sigmas, final)[: num_steps + 1])
    levels = [level_from_sigma(sigma) for sigma in sigmas[:-1]]
    return Grid(timesteps, [*levels, Level(np.float64(1), sigmas[-1])])


def exponential_grid(config: Mapping[str, Any], schedule: NoiseSchedule, num_steps: int) -> Grid:
    """Whole timesteps, one more than steps, the last unused: DPM-Solver and its kin."""
    train_sigmas = schedule.sigmas
    name, karras = config["_class_name"], config["use_karras_sigmas"]
    half_log_snr = -np.log(train_sigmas[::-1])
    clipped = int(np.searchsorted(half_log_snr, config.get("lambda_min_clipped", -np.inf)))
    timesteps = _spaced(config, num_steps, points=num_steps + 1, clipped=clipped).round()
    final = train_sigmas[0]
    respaced = _respaced(config, train_sigmas[::-1], num_steps)
    lu = config.get("use_lu_lambdas", False) and not karras
    if lu:  # Lu et al. 2022: evenly in log sigma, like the exponential ones
        first, last = np.log(train_sigmas[[-1, 0]])
        respaced = np.exp(np.linspace(first, last, num_steps))
    if respaced is None:
        sigmas = np.interp(timesteps, np.arange(len(train_sigmas)), train_sigmas)
    else:
        sigmas, timesteps = respaced, timesteps_from_sigmas(respaced, train_sigmas)
        cosine = config["beta_schedule"] == "squaredcos_cap_v2"
        if (karras or lu) and not (cosine and name == "DPMSolverMultistepScheduler"):
            timesteps = timesteps.round()
        if not name.startswith("DPMSolver"):
            final = sigmas[-1]
    if config.get("final_sigmas_type") == "zero":
        final = 0.0
    levels = [level_from_sigma(sigma) for sigma in _rounded(np.append(sigmas, final))]
    return Grid(np.trunc(timesteps), levels)


def _spaced(
    config: Mapping[str, Any], num_steps: int, *, points: int, clipped: int = 0
) -> NDArray[np.float64]:
    return spaced_timesteps(
        config.get("timestep_spacing", "linspace"),
        num_steps,
        points=points,
        num_train_timesteps=config["num_train_timesteps"],
        steps_offset=config.get("steps_offset", 0),
        clipped=clipped,
    )


def _respaced(
    config: Mapping[str, Any], sigmas: NDArray[Any], num_steps: int
) -> NDArray[np.float64] | None:
    """Sigmas from the first to the last of ``sigmas`` as the config spaces them; None: it does not.

    diffusers takes sigma_max and sigma_min from the config of any class, where they are given; only
    LMS does not for Karras' spacing.
    """
    first, last = config["sigma_max"], config["sigma_min"]
    if config["_class_name"].startswith("LMS") and config["use_karras_sigmas"]:
        first = last = None
    sigma_max = float(sigmas[0] if first is None else first)
    sigma_min = float(sigmas[-1] if last is None else last)
    if config.get("use_karras_sigmas"):
        return karras_sigmas(sigma_min, sigma_max, num_steps)
    if config.get("use_exponential_sigmas"):
        return exponential_sigmas(sigma_min, sigma_max, num_steps)
    if config.get("use_beta_sigmas"):
        return beta_sigmas(sigma_min, sigma_max, num_steps)
    return None


def _rounded(sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
    return sigmas.astype(np.float32).astype(np.float64)
