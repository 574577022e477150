"""Run a scheduler table, and the unmodified diffusers scheduler it stands for, on one model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch

from sd_runtime.noise import NoiseStream
from sd_runtime.scheduler_config import SCHEDULERS
from sd_runtime.table import compile_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from sd_runtime.table import SchedulerTable

SHAPE = (1, 4, 4, 4)
SEED = 3
V1_CONFIG: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""CompVis/stable-diffusion-v1-4's scheduler/scheduler_config.json."""


def model(sample: NDArray[Any], timestep: float) -> NDArray[Any]:
    """A UNet's stand-in: smooth, nonlinear, mixes its channels and listens to the timestep."""
    mixed = np.tanh(1.3 * sample + 0.2 * np.roll(sample, 1))
    return mixed * (0.8 + 0.2 * np.cos(timestep / 300))


def run_table(table: SchedulerTable, image: NDArray[Any] | None = None) -> NDArray[Any]:
    """The loop of `sd_runtime.table`, in float64, on the noise of ``SEED``."""
    stream = NoiseStream(SEED)
    noise = stream.normal(SHAPE).astype(np.float64)
    sample = table.init_noise_scale * noise
    if image is not None:
        sample = table.noised_alpha[0] * image + table.noised_sigma[0] * noise
    history = [np.zeros(SHAPE)] * table.coef_history.shape[1]
    for row in range(table.num_rows):
        output = model(sample, table.timesteps[row])
        h = table.pred_sample[row] * sample + table.pred_output[row] * output
        history = [h, *history[:-1]]
        sample = table.coef_sample[row] * sample
        for coefficient, past in zip(table.coef_history[row], history, strict=True):
            sample = sample + coefficient * past
        if table.draws_noise[row]:
            sample = sample + table.coef_noise[row, 0] * stream.normal(SHAPE)
    return sample


def run_diffusers(
    config: Mapping[str, Any],
    name: str,
    num_inference_steps: int,
    *,
    eta: float = 0.0,
    strength: float = 1.0,
    image: NDArray[Any] | None = None,
    float64: bool = False,
) -> NDArray[Any]:
    """diffusers' scheduler as its pipelines drive it, on the noise of ``SEED``.

    ``float64`` runs it on a grid cast to float64 once it is made, and deterministic ones on
    float64 samples: the same class without the rounding of its float32 arithmetic.
    """
    sampler = SCHEDULERS[name]
    scheduler = getattr(diffusers, sampler.class_name).from_config(config, **sampler.overrides)
    scheduler.set_timesteps(num_inference_steps)
    if float64:
        for attribute in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
            if hasattr(scheduler, attribute):
                setattr(scheduler, attribute, getattr(scheduler, attribute).double())
    begin = num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)
    begin *= scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)

    generator = torch.Generator("cpu").manual_seed(SEED)
    parameters = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"eta": eta} if "eta" in parameters else {}
    if "generator" in parameters:
        options["generator"] = generator
    deterministic = "generator" not in parameters or sampler.class_name.startswith("Euler")
    dtype = torch.float64 if float64 and deterministic else torch.float32
    noise = torch.randn(SHAPE, generator=generator).to(dtype)
    if image is None:
        sample = noise * scheduler.init_noise_sigma
    else:
        sample = scheduler.add_noise(torch.from_numpy(image).to(dtype), noise, timesteps[:1])
    for timestep in timesteps:
        model_input = scheduler.scale_model_input(sample, timestep).numpy()
        output = torch.from_numpy(model(model_input.astype(np.float64), float(timestep))).to(dtype)
        sample = scheduler.step(output, timestep, sample, **options).prev_sample
    return sample.double().numpy()


def relative_difference(
    config: Mapping[str, Any],
    name: str,
    num_inference_steps: int,
    *,
    eta: float = 0.0,
    strength: float = 1.0,
    float64: bool = False,
) -> float:
    """‖ours − diffusers'‖ / ‖diffusers'‖ of the final samples."""
    image = None
    if strength < 1:
        image = np.random.RandomState(0).standard_normal(SHAPE)
    table = compile_table(
        config,
        scheduler=name,
        num_inference_steps=num_inference_steps,
        eta=eta,
        strength=strength,
    )
    ours = run_table(table, image)
    theirs = run_diffusers(
        config,
        name,
        num_inference_steps,
        eta=eta,
        strength=strength,
        image=image,
        float64=float64,
    )
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
