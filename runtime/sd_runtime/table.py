"""A sampler as a table: a few numbers per UNet call, run by one five-line loop.

    h_i     = p·sample + q·model_output
    sample' = a·sample + Σ_k b[k]·h_{i-k} + Σ_m c[m]·noise

The sample is kept in the variance-preserving scale, so the UNet's input is the sample itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sd_engines.errors import ConfigError
from sd_runtime.linear_form import DEPTH
from sd_runtime.samplers import sampler_rows
from sd_runtime.scheduler_config import effective_config, scheduler_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from sd_runtime.rows import Rows

_KEPT: Final = 64
"""Tables that are remembered: a request asks for its own anew, and most ask for the same."""


@dataclass(frozen=True)
class SchedulerTable:
    """R rows, one per UNet call, with K model outputs of history; all float64, and read-only.

    A text-to-image sample starts as ``init_noise_scale · noise``, an image-to-image one as
    ``noised_alpha[0] · x₀ + noised_sigma[0] · noise``. After the last row it is what diffusers'
    scheduler returns.
    """

    timesteps: NDArray[np.float64]
    """[R] what the UNet is told; whole numbers for most samplers."""
    pred_sample: NDArray[np.float64]
    """[R] p."""
    pred_output: NDArray[np.float64]
    """[R] q."""
    coef_sample: NDArray[np.float64]
    """[R] a."""
    coef_history: NDArray[np.float64]
    """[R, K] b, newest first; 1 ≤ K ≤ 5, and 13 with PNDM's Runge-Kutta warm-up."""
    coef_noise: NDArray[np.float64]
    """[R, M] c; M = 0 for ODE samplers, 1 for stochastic ones."""
    draws_noise: NDArray[np.bool_]
    """[R] whether diffusers draws noise after this row's UNet call, be its coefficient 0 or not."""
    alpha: NDArray[np.float64]
    """[R + 1] signal level before each row, and after the last."""
    sigma: NDArray[np.float64]
    """[R + 1] noise level before each row, and after the last."""
    noised_alpha: NDArray[np.float64]
    """[R + 1] share of x₀ in what diffusers' add_noise makes of a picture before each row: alpha,
    but for SA-Solver on another grid than the trained one. 1 after the last row."""
    noised_sigma: NDArray[np.float64]
    """[R + 1] share of the noise in it: sigma, but for those and KDPM2's middle rows, where it is
    that of the step's end. 0 after the last row."""
    init_noise_scale: float
    """diffusers' init_noise_sigma in this scale: 1, or sigma[0] for k-diffusion's samplers."""

    @property
    def num_rows(self) -> int:
        """R, the number of UNet calls."""
        return len(self.timesteps)

    def until(self, row: int) -> SchedulerTable:
        """The rows before ``row``, for someone else to go on from."""
        levels = ("alpha", "sigma", "noised_alpha", "noised_sigma")
        cut = {
            field.name: getattr(self, field.name)[: row + (field.name in levels)]
            for field in fields(self)
            if field.name != "init_noise_scale"
        }
        return replace(self, **cut)


def compile_table(
    scheduler_config: Mapping[str, Any],
    *,
    scheduler: str | None = None,
    num_inference_steps: int,
    eta: float = 0.0,
    strength: float = 1.0,
    keeps_steps: bool = False,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
) -> SchedulerTable:
    """Compile a sampler to the rows that reproduce diffusers' scheduler.

    Args:
        scheduler_config: the checkpoint's ``scheduler_config.json``.
        scheduler: a name that `scheduler_name` knows; None is the checkpoint's own ``_class_name``.
        num_inference_steps: 1 … num_train_timesteps.
        eta: 0 … 1, the noise of DDIM and TCD; the others have no such setting.
        strength: 0 … 1, the share of the steps that image-to-image runs, as its pipeline counts.
        keeps_steps: of LCM, whether all steps run, over the share of the distillation that
            strength leaves, as the image-to-image pipeline of latent consistency models counts.
        denoising_start: 0 … 1, the share of the trained timesteps that another has done before, as
            the pipelines of Stable Diffusion XL count; it takes the place of strength.
        denoising_end: 0 … 1, the share after which another goes on.

    Raises:
        ConfigError: a value out of range, an unknown name, or a sampler that is not linear.

    """
    config = json.dumps(dict(scheduler_config))
    return _compiled(
        config,
        scheduler,
        num_inference_steps,
        eta,
        strength,
        keeps_steps,
        denoising_start,
        denoising_end,
    )


@lru_cache(maxsize=_KEPT)
def _compiled(
    scheduler_config_json: str,
    scheduler: str | None,
    num_inference_steps: int,
    eta: float,
    strength: float,
    keeps_steps: bool,
    denoising_start: float | None,
    denoising_end: float | None,
) -> SchedulerTable:
    scheduler_config = json.loads(scheduler_config_json)
    name = scheduler_name(scheduler or scheduler_config.get("_class_name", "PNDMScheduler"))
    config = effective_config(scheduler_config, name)
    num_train_timesteps = int(config["num_train_timesteps"])
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ConfigError(
            f"num_inference_steps {num_inference_steps} is out of range",
            f"Take 1 to {num_train_timesteps} steps.",
        )
    for word, value in (("eta", eta), ("strength", strength)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{word} {value} is out of range", f"Give {word} from 0 to 1.")
    if keeps_steps and config["_class_name"].startswith("LCM"):
        config["distilled_share"], strength = strength, 1.0
    begin = num_inference_steps - int(num_inference_steps * strength)
    if begin == num_inference_steps:
        raise _leaves_none(strength, num_inference_steps)
    two_stage = config["_class_name"].startswith(("Heun", "KDPM2"))
    if two_stage and (denoising_start is not None or denoising_end is not None):
        raise ConfigError(
            f"{name} calls the UNet twice a step, and two models cannot share a step",
            "Choose another scheduler, such as euler or dpm++_2m; or leave the refiner out.",
        )
    with np.errstate(all="ignore"):  # λ is ∞ without noise; every formula has its limit there
        rows = _rows(name, config, num_inference_steps, eta=eta, begin=begin)
        if not rows.timesteps:  # a schedule that is clipped has fewer steps than asked for
            raise _leaves_none(strength, num_inference_steps)
        if denoising_start is not None:
            begin = sum(t >= _cutoff(config, denoising_start) for t in rows.timesteps)
            if begin == len(rows.timesteps):
                raise ConfigError(
                    f"of {begin} steps none is left after {denoising_start:g} of them",
                    "Raise num_inference_steps, or begin earlier.",
                )
            rows = _rows(name, config, num_inference_steps, eta=eta, begin=begin)
        table = _table(rows, str(config["prediction_type"]))
    if denoising_end is not None:
        table = table.until(int((table.timesteps >= _cutoff(config, denoising_end)).sum()))
        if not table.num_rows:
            raise ConfigError(
                f"of {num_inference_steps} steps none is before {denoising_end:g} of them",
                "Raise num_inference_steps, or end later.",
            )
    columns = (table.pred_sample, table.coef_sample, table.coef_history, table.coef_noise)
    if not all(np.isfinite(column).all() for column in columns):
        raise _divides_by_zero(name)
    return table


def _cutoff(config: Mapping[str, Any], share: float) -> int:
    """The trained timestep that divides what two models do."""
    num_train_timesteps = int(config["num_train_timesteps"])
    return round(num_train_timesteps - share * num_train_timesteps)


def _rows(name: str, config: Mapping[str, Any], num_steps: int, *, eta: float, begin: int) -> Rows:
    try:
        return sampler_rows(config, num_steps, eta=eta, begin=begin)
    except np.linalg.LinAlgError as error:
        raise _divides_by_zero(name) from error


def _leaves_none(strength: float, num_steps: int) -> ConfigError:
    return ConfigError(
        f"strength {strength} of {num_steps} steps leaves none to run",
        "Raise strength or num_inference_steps.",
    )


def _divides_by_zero(name: str) -> ConfigError:
    return ConfigError(
        f"{name} divides by zero with these settings, as it does in diffusers",
        "With rescale_betas_zero_snr the model must not predict epsilon; else take fewer steps, or "
        "set lower_order_final to true or final_sigmas_type to 'sigma_min'.",
    )


def _table(rows: Rows, prediction_type: str) -> SchedulerTable:
    updates = np.array(rows.updates)
    history = updates[:, 1 : 1 + DEPTH]
    depth = int(np.max(np.nonzero(history.any(axis=0))[0], initial=0)) + 1
    noised = rows.noised_levels or rows.levels[:-1]
    converted = np.array([rows.conversion(prediction_type, level) for level in rows.levels[:-1]])
    table = SchedulerTable(
        timesteps=np.array(rows.timesteps, np.float64),
        pred_sample=converted[:, 0],
        pred_output=converted[:, 1],
        coef_sample=updates[:, 0],
        coef_history=history[:, :depth],
        coef_noise=updates[:, -2:-1] if any(rows.draws_noise) else updates[:, :0],
        draws_noise=np.asarray(rows.draws_noise, np.bool_),
        alpha=np.array([level.alpha for level in rows.levels]),
        sigma=np.array([level.sigma for level in rows.levels]),
        noised_alpha=np.array([*(level.alpha for level in noised), 1.0]),
        noised_sigma=np.array([*(level.sigma for level in noised), 0.0]),
        init_noise_scale=rows.init_noise_scale,
    )
    for field in fields(table):
        if field.name != "init_noise_scale":
            getattr(table, field.name).flags.writeable = False  # others have it too
    return table
