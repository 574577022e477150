"""Sampler = noise schedule × timestep grid × solver: what each diffusers class puts together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from sd_engines.errors import ConfigError, nearest

from sd_runtime import exponential_solvers, solvers
from sd_runtime.linear_form import Form
from sd_runtime.noise_schedule import Level, NoiseSchedule, level_from_sigma
from sd_runtime.timestep_grid import (
    beta_sigmas,
    distilled_timesteps,
    exponential_sigmas,
    karras_sigmas,
    spaced_timesteps,
    timesteps_from_sigmas,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    Config: TypeAlias = Mapping[str, Any]
    Conversion: TypeAlias = Callable[[str, Level], tuple[float, float]]


@dataclass(frozen=True)
class Rows:
    """The rows of a table before they are laid out: one UNet call each, R + 1 levels."""

    timesteps: Sequence[float] | NDArray[np.float64]
    levels: Sequence[Level]
    conversion: Conversion
    updates: Iterable[Form]
    draws_noise: Sequence[bool]
    init_noise_scale: float = 1.0


def x0_prediction(prediction_type: str, level: Level) -> tuple[float, float]:
    """(p, q) with x₀ = p·sample + q·model_output. Salimans & Ho 2022, appendix D, for v."""
    match prediction_type:
        case "epsilon":
            return 1 / level.alpha, -level.sigma / level.alpha
        case "sample":
            return 0.0, 1.0
        case "v_prediction":
            return level.alpha, -level.sigma
    raise _unknown_prediction_type(prediction_type)


def epsilon_prediction(prediction_type: str, level: Level) -> tuple[float, float]:
    """(p, q) with ε = p·sample + q·model_output."""
    match prediction_type:
        case "epsilon":
            return 0.0, 1.0
        case "sample":
            return 1 / level.sigma, -level.alpha / level.sigma
        case "v_prediction":
            return level.sigma, level.alpha
    raise _unknown_prediction_type(prediction_type)


def unconverted(_prediction_type: str, _level: Level) -> tuple[float, float]:
    """(0, 1): the model's output as it is."""
    return 0.0, 1.0


def _unknown_prediction_type(prediction_type: str) -> ConfigError:
    return ConfigError(
        f"prediction_type {prediction_type!r} is not supported",
        nearest(prediction_type, ("epsilon", "sample", "v_prediction")),
    )


def plan(
    config: Config, schedule: NoiseSchedule, num_steps: int, *, eta: float, begin: int
) -> Rows:
    """The rows of ``config["_class_name"]``, from step ``begin`` on.

    ConfigError for a setting that its solver does not have.
    """
    match config["_class_name"]:
        case "DDIMScheduler":
            return _ddim(config, schedule, num_steps, eta, begin)
        case "DDPMScheduler":
            return _ddpm(config, schedule, num_steps, begin)
        case "PNDMScheduler":
            return _pndm(config, schedule, num_steps, begin)
        case "EulerDiscreteScheduler":
            return _euler(config, schedule, num_steps, begin, eta=0.0)
        case "EulerAncestralDiscreteScheduler":
            return _euler(config, schedule, num_steps, begin, eta=1.0)
        case "HeunDiscreteScheduler":
            return _heun(config, schedule, num_steps, begin)
        case "KDPM2DiscreteScheduler":
            return _dpm2(config, schedule, num_steps, begin, ancestral=False)
        case "KDPM2AncestralDiscreteScheduler":
            return _dpm2(config, schedule, num_steps, begin, ancestral=True)
        case "LMSDiscreteScheduler":
            return _lms(config, schedule, num_steps, begin)
        case "DPMSolverMultistepScheduler":
            return _dpm_solver_multistep(config, schedule, num_steps, begin)
        case "DPMSolverSinglestepScheduler":
            return _dpm_solver_singlestep(config, schedule, num_steps, begin)
        case "UniPCMultistepScheduler":
            return _uni_pc(config, schedule, num_steps, begin)
        case "DEISMultistepScheduler":
            return _deis(config, schedule, num_steps, begin)
        case "SASolverScheduler":
            return _sa_solver(config, schedule, num_steps, begin)
        case "LCMScheduler":
            return _lcm(config, schedule, num_steps, begin)
        case "TCDScheduler":
            return _tcd(config, schedule, num_steps, eta, begin)
    raise AssertionError(config["_class_name"])


# --- whole training timesteps -------------------------------------------------------------------


def _trained_timesteps(config: Config, num_steps: int) -> list[int]:
    """Whole timesteps, descending, for samplers that look their levels up by timestep."""
    grid = spaced_timesteps(
        config["timestep_spacing"],
        num_steps,
        points=num_steps,
        num_train_timesteps=config["num_train_timesteps"],
        steps_offset=config["steps_offset"],
    )
    return [int(timestep) for timestep in grid.round()]


def _ddim(
    config: Config, schedule: NoiseSchedule, num_steps: int, eta: float, begin: int
) -> Rows:
    timesteps = _trained_timesteps(config, num_steps)[begin:]
    stride = config["num_train_timesteps"] // num_steps
    steps = [(schedule.level_at(t), schedule.level_at(t - stride)) for t in timesteps]
    return Rows(
        timesteps=timesteps,
        levels=[*(source for source, _ in steps), steps[-1][1]],
        conversion=x0_prediction,
        updates=list(solvers.ddim(steps, eta=eta)),
        draws_noise=[eta > 0] * len(timesteps),
    )


def _ddpm(config: Config, schedule: NoiseSchedule, num_steps: int, begin: int) -> Rows:
    timesteps = _trained_timesteps(config, num_steps)[begin:]
    levels = [schedule.level_at(t) for t in [*timesteps, -1]]
    variance_type = config["variance_type"]
    if variance_type not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise ConfigError(
            f"variance_type {variance_type!r} is not supported",
            nearest(str(variance_type), ("fixed_small", "fixed_small_log", "fixed_large")),
        )
    steps = pairwise(levels)
    return Rows(
        timesteps=timesteps,
        levels=levels,
        conversion=x0_prediction,
        updates=list(solvers.ddpm(steps, fixed_large=variance_type == "fixed_large")),
        draws_noise=[t > 0 for t in timesteps],
    )


def _pndm(config: Config, schedule: NoiseSchedule, num_steps: int, begin: int) -> Rows:
    grid = _trained_timesteps(config, num_steps)
    stride = config["num_train_timesteps"] // num_steps
    warm_up: list[int] = []
    if config["skip_prk_steps"]:
        timesteps = [*grid[:2], *grid[1:]][begin:]
    else:
        if begin or num_steps < 4:
            raise ConfigError(
                "PNDM with Runge-Kutta warm-up takes at least 4 steps, at strength 1",
                "Choose 'plms', or set skip_prk_steps to true in the scheduler config.",
            )
        for timestep, following in pairwise(grid[:4]):
            middle = following + stride // 2
            warm_up += [timestep, middle, middle, following]
        timesteps = grid[3:]
    prediction_type = config["prediction_type"]

    def epsilon_from(sample: Form, output: Form, level: Level) -> Form:
        p, q = epsilon_prediction(prediction_type, level)
        return p * sample + q * output

    rows = [*warm_up, *timesteps]
    updates = solvers.pndm(
        warm_up,
        timesteps,
        stride=stride,
        level_at=schedule.level_at,
        epsilon_from=epsilon_from,
    )
    return Rows(
        timesteps=rows,
        levels=[schedule.level_at(t) for t in [*rows, rows[-1] - stride]],
        conversion=unconverted,
        updates=list(updates),
        draws_noise=[False] * len(rows),
    )


def _lcm(config: Config, schedule: NoiseSchedule, num_steps: int, begin: int) -> Rows:
    timesteps = _distilled(config, num_steps)[begin:]
    levels = [
        *(schedule.level_at(t) for t in timesteps),
        Level(np.float64(1), np.float64(0)),
    ]
    steps = list(zip(timesteps, levels[1:], strict=True))
    return Rows(
        timesteps=timesteps,
        levels=levels,
        conversion=x0_prediction,
        updates=list(solvers.lcm(steps, timestep_scaling=config["timestep_scaling"])),
        draws_noise=[*[True] * (len(timesteps) - 1), False],
    )


def _tcd(
    config: Config, schedule: NoiseSchedule, num_steps: int, eta: float, begin: int
) -> Rows:
    timesteps = _distilled(config, num_steps)[begin:]
    targets = [*timesteps[1:], 0]
    levels = [schedule.level_at(t) for t in [*timesteps, 0]]
    kept = np.float32(1 - eta)  # torch multiplies in float32 before it takes the floor
    steps = [
        (source, schedule.level_at(int(kept * np.float32(t))), target)
        for source, t, target in zip(levels[:-1], targets, levels[1:], strict=True)
    ]
    return Rows(
        timesteps=timesteps,
        levels=levels,
        conversion=x0_prediction,
        updates=list(solvers.tcd(steps)),
        draws_noise=[*[eta > 0] * (len(timesteps) - 1), False],
    )


def _distilled(config: Config, num_steps: int) -> list[int]:
    grid = distilled_timesteps(
        num_steps,
        original_inference_steps=config["original_inference_steps"],
        num_train_timesteps=config["num_train_timesteps"],
    )
    return [int(timestep) for timestep in grid]


# --- k-diffusion's grids: fractional timesteps, down to sigma = 0 --------------------------------


@dataclass(frozen=True)
class _Grid:
    timesteps: NDArray[np.float64]  # [N]
    levels: list[Level]  # [N + 1]


def _respaced(config: Config, sigmas: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """As many sigmas between the first and the last, spaced as the config asks; None: it does not.

    diffusers reads sigma_min and sigma_max from the config of any class, where they are given.
    """
    first = sigmas[0] if config["sigma_max"] is None else config["sigma_max"]
    last = sigmas[-1] if config["sigma_min"] is None else config["sigma_min"]
    if config["use_karras_sigmas"]:
        return karras_sigmas(float(last), float(first), len(sigmas))
    if config["use_exponential_sigmas"]:
        return exponential_sigmas(float(last), float(first), len(sigmas))
    if config["use_beta_sigmas"]:
        return beta_sigmas(float(last), float(first), len(sigmas))
    return None


def _k_diffusion_grid(config: Config, schedule: NoiseSchedule, num_steps: int) -> _Grid:
    timesteps = spaced_timesteps(
        config["timestep_spacing"],
        num_steps,
        points=num_steps,
        num_train_timesteps=config["num_train_timesteps"],
        steps_offset=config["steps_offset"],
    )
    train_sigmas = schedule.sigmas
    sigmas = np.interp(timesteps, np.arange(len(train_sigmas)), train_sigmas)
    if config.get("interpolation_type") == "log_linear":
        log_sigmas = np.log(train_sigmas)
        sigmas = np.exp(np.linspace(log_sigmas[-1], log_sigmas[0], num_steps + 1))
    respaced = _respaced(config, sigmas[:num_steps]) if "use_karras_sigmas" in config else None
    last = 0.0
    if respaced is not None:
        sigmas = respaced
        timesteps = timesteps_from_sigmas(sigmas, train_sigmas)
        if config["_class_name"].startswith("KDPM2") and config["use_karras_sigmas"]:
            timesteps = timesteps.round()
    if config.get("final_sigmas_type") == "sigma_min":
        last = float(train_sigmas[0])
    sigmas = np.append(sigmas, last)[: num_steps + 1].astype(np.float32).astype(np.float64)
    levels = [level_from_sigma(sigma) for sigma in sigmas[:-1]]
    return _Grid(timesteps, [*levels, Level(np.float64(1), sigmas[-1])])


def _init_noise_scale(config: Config, grid: _Grid) -> float:
    """diffusers starts from noise · sigma, or with "leading" · √(sigma² + 1); here in VP scale."""
    leading = config["timestep_spacing"] == "leading"
    return 1.0 if leading else float(grid.levels[0].sigma)


def _euler(
    config: Config, schedule: NoiseSchedule, num_steps: int, begin: int, *, eta: float
) -> Rows:
    grid = _k_diffusion_grid(config, schedule, num_steps)
    levels = grid.levels[begin:]
    return Rows(
        timesteps=grid.timesteps[begin:],
        levels=levels,
        conversion=x0_prediction,
        updates=list(solvers.ddim(pairwise(levels), eta=eta)),
        draws_noise=[eta > 0] * (len(levels) - 1),
        init_noise_scale=_init_noise_scale(config, grid),
    )


def _heun(config: Config, schedule: NoiseSchedule, num_steps: int, begin: int) -> Rows:
    grid = _k_diffusion_grid(config, schedule, num_steps)
    levels, timesteps = grid.levels[begin:], grid.timesteps[begin:]
    doubled = [level for level in levels[1:-1] for _ in range(2)]
    rows = [timesteps[0], *np.repeat(timesteps[1:], 2)]
    return Rows(
        timesteps=rows,
        levels=[levels[0], *doubled, levels[-1]],
        conversion=epsilon_prediction,
        updates=list(solvers.heun(levels)),
        draws_noise=[False] * len(rows),
        init_noise_scale=_init_noise_scale(config, grid),
    )


def _dpm2(
    config: Config, schedule: NoiseSchedule, num_steps: int, begin: int, *, ancestral: bool
) -> Rows:
    grid = _k_diffusion_grid(config, schedule, num_steps)
    levels, timesteps = grid.levels[begin:], grid.timesteps[begin:]
    steps = [solvers.midpoint_step(s, t, ancestral=ancestral) for s, t in pairwise(levels)]
    middles = [step.middle for step in steps[:-1]]
    sigmas = np.array([level.noise_to_signal for level in middles])
    between = timesteps_from_sigmas(sigmas, schedule.sigmas)
    rows = [float(timesteps[0])]
    row_levels = [levels[0]]
    for i, middle in enumerate(middles):
        rows += [float(between[i]), float(timesteps[i + 1])]
        row_levels += [middle, levels[i + 1]]
    return Rows(
        timesteps=rows,
        levels=[*row_levels, levels[-1]],
        conversion=epsilon_prediction,
        updates=list(solvers.dpm2(steps)),
        draws_noise=[ancestral and row % 2 == 1 for row in range(len(rows))],
        init_noise_scale=_init_noise_scale(config, grid),
    )


def _lms(config: Config, schedule: NoiseSchedule, num_steps: int, begin: int) -> Rows:
    grid = _k_diffusion_grid(config, schedule, num_steps)
    return Rows(
        timesteps=grid.timesteps[begin:],
        levels=grid.levels[begin:],
        conversion=epsilon_prediction,
        updates=list(solvers.lms(grid.levels, begin=begin)),
        draws_noise=[False] * (num_steps - begin),
        init_noise_scale=_init_noise_scale(config, grid),
    )


# --- grids of the exponential solvers: whole timesteps, one more than the steps ------------------


def _exponential_grid(config: Config, schedule: NoiseSchedule, num_steps: int) -> _Grid:
    train_sigmas = schedule.sigmas
    name, karras = config["_class_name"], config["use_karras_sigmas"]
    clipped = int(
        np.searchsorted(-np.log(train_sigmas[::-1]), config.get("lambda_min_clipped", -np.inf))
    )
    timesteps = spaced_timesteps(
        config.get("timestep_spacing", "linspace"),
        num_steps,
        points=num_steps + 1,
        num_train_timesteps=config["num_train_timesteps"] - clipped,
        steps_offset=config.get("steps_offset", 0),
    ).round()
    last = train_sigmas[0]
    respaced = _respaced(config, np.linspace(train_sigmas[-1], train_sigmas[0], num_steps))
    if config.get("use_lu_lambdas") and not karras:  # evenly spaced in log sigma as well
        log_sigmas = np.log(train_sigmas)
        respaced = np.exp(np.linspace(log_sigmas[-1], log_sigmas[0], num_steps))
    if respaced is not None:
        sigmas = respaced
        timesteps = timesteps_from_sigmas(sigmas, train_sigmas)
        cosine = config["beta_schedule"] == "squaredcos_cap_v2"
        whole = karras or config.get("use_lu_lambdas")
        if whole and not (name == "DPMSolverMultistepScheduler" and cosine):
            timesteps = timesteps.round()
        if not name.startswith("DPMSolver"):
            last = sigmas[-1]
    else:
        sigmas = np.interp(timesteps, np.arange(len(train_sigmas)), train_sigmas)
    if config.get("final_sigmas_type") == "zero":
        last = 0.0
    rounded = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    return _Grid(np.trunc(timesteps), [level_from_sigma(sigma) for sigma in rounded])


def _exponential_rows(
    grid: _Grid, updates: Iterable[Form], begin: int, *, on_x0: bool, stochastic: bool = False
) -> Rows:
    return Rows(
        timesteps=grid.timesteps[begin:],
        levels=grid.levels[begin:],
        conversion=x0_prediction if on_x0 else epsilon_prediction,
        updates=list(updates),
        draws_noise=[stochastic] * (len(grid.timesteps) - begin),
    )


def _choice(config: Config, key: str, choices: Mapping[str, str]) -> str:
    """The setting's value, or what diffusers makes of another class's; ConfigError otherwise."""
    value = config[key]
    if value not in choices:
        raise ConfigError(f"{key} {value!r} is not supported", nearest(str(value), choices))
    return choices[value]


def _order(config: Config, key: str, highest: int) -> int:
    order = config[key]
    if not 1 <= order <= highest:
        raise ConfigError(f"{key} {order} is out of range", f"Give it from 1 to {highest}.")
    return int(order)


_DPM_SOLVER_TYPES = {
    "midpoint": "midpoint",
    "heun": "heun",
    **dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
}
_ALGORITHMS: dict[str, exponential_solvers.Algorithm] = {
    "dpmsolver": "dpmsolver",
    "dpmsolver++": "dpmsolver++",
    "sde-dpmsolver": "sde-dpmsolver",
    "sde-dpmsolver++": "sde-dpmsolver++",
    "deis": "dpmsolver++",
}


def _dpm_solver_multistep(
    config: Config, schedule: NoiseSchedule, num_steps: int, begin: int
) -> Rows:
    algorithm = _dpm_solver_algorithm(config)
    grid = _exponential_grid(config, schedule, num_steps)
    order = _order(config, "solver_order", 2 if algorithm == "sde-dpmsolver" else 3)
    updates = exponential_solvers.dpm_solver_multistep(
        grid.levels,
        begin=begin,
        order=order,
        algorithm=algorithm,
        solver_type=_choice(config, "solver_type", _DPM_SOLVER_TYPES),
        lower_order_final=config["lower_order_final"],
        first_order_final=config["euler_at_final"] or config["final_sigmas_type"] == "zero",
    )
    return _exponential_rows(
        grid,
        updates,
        begin,
        on_x0=algorithm.endswith("++"),
        stochastic=algorithm.startswith("sde"),
    )


def _dpm_solver_singlestep(
    config: Config, schedule: NoiseSchedule, num_steps: int, begin: int
) -> Rows:
    algorithm = _dpm_solver_algorithm(config)
    if algorithm == "sde-dpmsolver" or algorithm == "sde-dpmsolver++":
        raise ConfigError(
            f"algorithm_type {algorithm!r} of a singlestep solver is not supported: its rows need "
            "the noise of earlier ones",
            "Choose 'dpm++_2m_sde', or set algorithm_type to 'dpmsolver++'.",
        )
    grid = _exponential_grid(config, schedule, num_steps)
    order = _order(config, "solver_order", 3)
    zero = config["final_sigmas_type"] == "zero"
    lower_order_final = config["lower_order_final"] or num_steps % order != 0 or zero
    orders = exponential_solvers.singlestep_orders(
        num_steps, order, lower_order_final=lower_order_final
    )
    if zero:
        orders[-1] = 1
    updates = exponential_solvers.dpm_solver_singlestep(
        grid.levels,
        begin=begin,
        orders=orders,
        algorithm=algorithm,
        solver_type=_choice(config, "solver_type", _DPM_SOLVER_TYPES),
    )
    return _exponential_rows(grid, updates, begin, on_x0=algorithm == "dpmsolver++")


def _dpm_solver_algorithm(config: Config) -> exponential_solvers.Algorithm:
    name = config["algorithm_type"]
    if name not in _ALGORITHMS:
        raise ConfigError(
            f"algorithm_type {name!r} is not supported", nearest(str(name), _ALGORITHMS)
        )
    algorithm = _ALGORITHMS[name]
    if not algorithm.endswith("++") and config["final_sigmas_type"] == "zero":
        raise ConfigError(
            f"algorithm_type {algorithm!r} cannot end at sigma 0",
            "Set final_sigmas_type to 'sigma_min', or algorithm_type to 'dpmsolver++'.",
        )
    return algorithm


def _uni_pc(config: Config, schedule: NoiseSchedule, num_steps: int, begin: int) -> Rows:
    grid = _exponential_grid(config, schedule, num_steps)
    types = {"bh1": "bh1", "bh2": "bh2", **dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")}
    updates = exponential_solvers.uni_pc(
        grid.levels,
        begin=begin,
        order=_order(config, "solver_order", 3),
        predict_x0=config["predict_x0"],
        solver_type=_choice(config, "solver_type", types),
        lower_order_final=config["lower_order_final"],
        disable_corrector=config["disable_corrector"],
    )
    return _exponential_rows(grid, updates, begin, on_x0=config["predict_x0"])


def _deis(config: Config, schedule: NoiseSchedule, num_steps: int, begin: int) -> Rows:
    grid = _exponential_grid(config, schedule, num_steps)
    updates = exponential_solvers.deis(
        grid.levels,
        begin=begin,
        order=_order(config, "solver_order", 3),
        lower_order_final=config["lower_order_final"],
    )
    return _exponential_rows(grid, updates, begin, on_x0=False)


def _sa_solver(config: Config, schedule: NoiseSchedule, num_steps: int, begin: int) -> Rows:
    grid = _exponential_grid(config, schedule, num_steps)
    types = {name: name for name in ("data_prediction", "noise_prediction")}
    on_x0 = _choice(config, "algorithm_type", types) == "data_prediction"
    updates = exponential_solvers.sa_solver(
        grid.levels,
        begin=begin,
        taus=[1.0 if 200 <= timestep <= 800 else 0.0 for timestep in grid.timesteps],
        predictor_order=_order(config, "predictor_order", 4),
        corrector_order=_order(config, "corrector_order", 4),
        predict_x0=on_x0,
        lower_order_final=config["lower_order_final"],
    )
    return _exponential_rows(grid, updates, begin, on_x0=on_x0, stochastic=True)


SMALLEST_ALPHA_CUMPROD: dict[str, float] = {
    "EulerDiscreteScheduler": 2.0**-24,
    "EulerAncestralDiscreteScheduler": 2.0**-24,
    "DPMSolverMultistepScheduler": 2.0**-24,
    "UniPCMultistepScheduler": 2.0**-24,
}
"""What replaces alphas_cumprod = 0 at the end of a zero-SNR schedule, by class; 0 elsewhere."""
