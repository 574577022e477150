"""Sampler = noise schedule × timestep grid × solver: what each diffusers class puts together."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.errors import ConfigError
from sd_runtime import exponential_samplers, solvers
from sd_runtime.noise_schedule import Level, noise_schedule
from sd_runtime.prediction import epsilon_prediction, unconverted, x0_prediction
from sd_runtime.rows import Rows, Run
from sd_runtime.scheduler_config import choice
from sd_runtime.timestep_grid import (
    Grid,
    distilled_grid,
    k_diffusion_grid,
    trained_grid,
)
from sd_runtime.timestep_spacing import timesteps_from_sigmas

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sd_runtime.linear_form import Form


def sampler_rows(config: Mapping[str, Any], num_steps: int, *, eta: float, begin: int) -> Rows:
    """The rows of ``config["_class_name"]``; ConfigError for a setting that it does not have."""
    name = config["_class_name"]
    schedule = noise_schedule(config, min_alpha_cumprod=_MIN_ALPHA_CUMPROD.get(name, 0.0))
    return _SAMPLERS[name](Run(config, schedule, num_steps, eta, begin))


def ddim(run: Run) -> Rows:
    """DDIMScheduler: its steps are of equal length, even where its timesteps are not."""
    timesteps = trained_grid(run.config, run.num_steps)[run.begin :]
    stride = run.config["num_train_timesteps"] // run.num_steps
    level_at = run.schedule.level_at
    steps = [(level_at(t), level_at(t - stride)) for t in timesteps]
    return Rows(
        timesteps=timesteps,
        levels=[*(source for source, _ in steps), steps[-1][1]],
        conversion=x0_prediction,
        updates=list(solvers.ddim(steps, eta=run.eta)),
        draws_noise=[run.eta > 0] * len(timesteps),
    )


def ddpm(run: Run) -> Rows:
    """DDPMScheduler."""
    types = {"fixed_small": False, "fixed_small_log": False, "fixed_large": True}
    fixed_large = choice(run.config, "variance_type", types)
    timesteps = trained_grid(run.config, run.num_steps)[run.begin :]
    levels = [run.schedule.level_at(t) for t in [*timesteps, -1]]
    return Rows(
        timesteps=timesteps,
        levels=levels,
        conversion=x0_prediction,
        updates=list(solvers.ddpm(pairwise(levels), fixed_large=fixed_large)),
        draws_noise=[t > 0 for t in timesteps],
    )


def pndm(run: Run) -> Rows:
    """PNDMScheduler: PLMS with skip_prk_steps, as v1 has it, else the paper's Runge-Kutta start."""
    config, level_at = run.config, run.schedule.level_at
    grid = trained_grid(config, run.num_steps)
    stride = config["num_train_timesteps"] // run.num_steps
    warm_up: list[int] = []
    if config["skip_prk_steps"]:
        timesteps = [*grid[:2], *grid[1:]][run.begin :]
    elif run.begin or run.num_steps < 4:
        raise ConfigError(
            "PNDM with Runge-Kutta warm-up takes at least 4 steps, at strength 1",
            "Choose 'plms', or set skip_prk_steps to true in the scheduler config.",
        )
    else:
        for timestep, following in pairwise(grid[:4]):
            middle = following + stride // 2
            warm_up += [timestep, middle, middle, following]
        timesteps = grid[3:]

    def epsilon_from(sample: Form, output: Form, level: Level) -> Form:
        p, q = epsilon_prediction(config["prediction_type"], level)
        return p * sample + q * output

    rows = [*warm_up, *timesteps]
    updates = solvers.pndm(
        warm_up, timesteps, stride=stride, level_at=level_at, epsilon_from=epsilon_from
    )
    return Rows(
        timesteps=rows,
        levels=[level_at(t) for t in [*rows, rows[-1] - stride]],
        conversion=unconverted,
        updates=list(updates),
        draws_noise=[False] * len(rows),
    )


def lcm(run: Run) -> Rows:
    """LCMScheduler: noise after every step but the last."""
    timesteps = distilled_grid(run.config, run.num_steps)[run.begin :]
    levels = [run.schedule.level_at(t) for t in timesteps]
    levels.append(Level(np.float64(1), np.float64(0)))
    steps = zip(timesteps, levels[1:], strict=True)
    return Rows(
        timesteps=timesteps,
        levels=levels,
        conversion=x0_prediction,
        updates=list(solvers.lcm(steps, timestep_scaling=run.config["timestep_scaling"])),
        draws_noise=[*[True] * (len(timesteps) - 1), False],
    )


def tcd(run: Run) -> Rows:
    """TCDScheduler; eta is the paper's gamma, and the pipelines' default is 0."""
    timesteps = distilled_grid(run.config, run.num_steps)[run.begin :]
    targets = [*timesteps[1:], 0]
    level_at = run.schedule.level_at
    levels = [level_at(t) for t in [*timesteps, 0]]
    kept = np.float32(1 - run.eta)  # torch multiplies in float32 before it takes the floor
    intermediates = [level_at(int(kept * np.float32(t))) for t in targets]
    return Rows(
        timesteps=timesteps,
        levels=levels,
        conversion=x0_prediction,
        updates=list(solvers.tcd(zip(levels[:-1], intermediates, levels[1:], strict=True))),
        draws_noise=[*[run.eta > 0] * (len(timesteps) - 1), False],
    )


def euler(run: Run, *, eta: float) -> Rows:
    """EulerDiscreteScheduler (eta 0) and EulerAncestralDiscreteScheduler (1): DDIM's formula."""
    grid = k_diffusion_grid(run.config, run.schedule, run.num_steps)
    levels = grid.levels[run.begin :]
    return Rows(
        timesteps=grid.timesteps[run.begin :].tolist(),
        levels=levels,
        conversion=x0_prediction,
        updates=list(solvers.ddim(pairwise(levels), eta=eta)),
        draws_noise=[eta > 0] * (len(levels) - 1),
        init_noise_scale=_init_noise_scale(run, grid),
    )


def heun(run: Run) -> Rows:
    """HeunDiscreteScheduler: two rows a step, but for the last."""
    grid = k_diffusion_grid(run.config, run.schedule, run.num_steps)
    levels = grid.levels[run.begin :]
    timesteps = np.repeat(grid.timesteps[run.begin :], 2)[1:].tolist()
    inner = [level for level in levels[1:-1] for _stage in range(2)]
    return Rows(
        timesteps=timesteps,
        levels=[levels[0], *inner, levels[-1]],
        conversion=epsilon_prediction,
        updates=list(solvers.heun(levels)),
        draws_noise=[False] * len(timesteps),
        init_noise_scale=_init_noise_scale(run, grid),
    )


def dpm2(run: Run, *, ancestral: bool) -> Rows:
    """KDPM2DiscreteScheduler and KDPM2AncestralDiscreteScheduler: two rows a step, but the last."""
    grid = k_diffusion_grid(run.config, run.schedule, run.num_steps)
    levels, timesteps = grid.levels[run.begin :], grid.timesteps[run.begin :]
    steps = [solvers.midpoint_step(s, t, ancestral=ancestral) for s, t in pairwise(levels)]
    middles = [step.middle for step in steps[:-1]]
    middle_sigmas = np.array([level.noise_to_signal for level in middles])
    between = timesteps_from_sigmas(middle_sigmas, run.schedule.sigmas)
    stages = zip(between, middles, timesteps[1:], levels[1:], strict=False)
    rows = [(timesteps[0], levels[0])]
    noised_levels = [levels[0]]
    for middle_timestep, middle, timestep, level in stages:
        rows += [(middle_timestep, middle), (timestep, level)]
        early = Level(middle.alpha, middle.alpha * level.noise_to_signal)  # as diffusers adds noise
        noised_levels += [early, level]
    return Rows(
        timesteps=[timestep for timestep, _ in rows],
        levels=[*(level for _, level in rows), levels[-1]],
        conversion=epsilon_prediction,
        updates=list(solvers.dpm2(steps)),
        draws_noise=[ancestral and row % 2 == 1 for row in range(len(rows))],
        init_noise_scale=_init_noise_scale(run, grid),
        noised_levels=noised_levels,
    )


def lms(run: Run) -> Rows:
    """LMSDiscreteScheduler."""
    grid = k_diffusion_grid(run.config, run.schedule, run.num_steps)
    return Rows(
        timesteps=grid.timesteps[run.begin :].tolist(),
        levels=grid.levels[run.begin :],
        conversion=epsilon_prediction,
        updates=list(solvers.lms(grid.levels, begin=run.begin)),
        draws_noise=[False] * (run.num_steps - run.begin),
        init_noise_scale=_init_noise_scale(run, grid),
    )


_SAMPLERS: Mapping[str, Callable[[Run], Rows]] = {
    "DDIMScheduler": ddim,
    "DDPMScheduler": ddpm,
    "PNDMScheduler": pndm,
    "LCMScheduler": lcm,
    "TCDScheduler": tcd,
    "EulerDiscreteScheduler": partial(euler, eta=0.0),
    "EulerAncestralDiscreteScheduler": partial(euler, eta=1.0),
    "HeunDiscreteScheduler": heun,
    "KDPM2DiscreteScheduler": partial(dpm2, ancestral=False),
    "KDPM2AncestralDiscreteScheduler": partial(dpm2, ancestral=True),
    "LMSDiscreteScheduler": lms,
    "DPMSolverMultistepScheduler": exponential_samplers.dpm_solver_multistep,
    "DPMSolverSinglestepScheduler": exponential_samplers.dpm_solver_singlestep,
    "UniPCMultistepScheduler": exponential_samplers.uni_pc,
    "DEISMultistepScheduler": exponential_samplers.deis,
    "SASolverScheduler": exponential_samplers.sa_solver,
}
_MIN_ALPHA_CUMPROD = dict.fromkeys(
    (
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ),
    2.0**-24,
)
"""Classes that put this in place of the 0 at the end of a zero-SNR schedule."""


def _init_noise_scale(run: Run, grid: Grid) -> float:
    """How diffusers starts, noise · sigma or with "leading" noise · √(sigma² + 1), in VP scale."""
    leading = run.config["timestep_spacing"] == "leading"
    return 1.0 if leading else float(grid.levels[0].sigma)
