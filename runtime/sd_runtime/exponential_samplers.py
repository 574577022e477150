"""DPM-Solver and its kin: what their diffusers classes put together, see `samplers`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ConfigError
from sd_runtime import exponential_adams_solvers, exponential_solvers
from sd_runtime.prediction import epsilon_prediction, x0_prediction
from sd_runtime.rows import Rows, Run
from sd_runtime.scheduler_config import choice, order
from sd_runtime.timestep_grid import Grid, exponential_grid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sd_runtime.linear_form import Form


def dpm_solver_multistep(run: Run) -> Rows:
    """DPMSolverMultistepScheduler: DPM-Solver(++) and SDE-DPM-Solver(++)."""
    config, algorithm = run.config, _dpm_solver_algorithm(run.config)
    grid = exponential_grid(config, run.schedule, run.num_steps)
    updates = exponential_solvers.dpm_solver_multistep(
        grid.levels,
        begin=run.begin,
        order=order(config, "solver_order", 2 if algorithm == "sde-dpmsolver" else 3),
        algorithm=algorithm,
        solver_type=choice(config, "solver_type", _DPM_SOLVER_TYPES),
        lower_order_final=config["lower_order_final"],
        first_order_final=config["euler_at_final"] or config["final_sigmas_type"] == "zero",
    )
    x0, stochastic = algorithm.endswith("++"), algorithm.startswith("sde")
    return _exponential_rows(run, grid, list(updates), x0=x0, stochastic=stochastic)


def dpm_solver_singlestep(run: Run) -> Rows:
    """DPMSolverSinglestepScheduler."""
    config, algorithm = run.config, _dpm_solver_algorithm(run.config)
    if algorithm.startswith("sde"):
        raise ConfigError(
            f"algorithm_type {algorithm!r} of a singlestep solver is not supported: its rows need "
            "the noise of earlier ones",
            "Choose 'dpm++_2m_sde', or set algorithm_type to 'dpmsolver++'.",
        )
    grid = exponential_grid(config, run.schedule, run.num_steps)
    solver_order = order(config, "solver_order", 3)
    to_zero = config["final_sigmas_type"] == "zero"
    low = config["lower_order_final"] or run.num_steps % solver_order != 0 or to_zero
    orders = exponential_solvers.singlestep_orders(
        run.num_steps, solver_order, lower_order_final=low
    )
    if to_zero:
        orders[-1] = 1
    updates = exponential_solvers.dpm_solver_singlestep(
        grid.levels,
        begin=run.begin,
        orders=orders,
        algorithm=algorithm,
        solver_type=choice(config, "solver_type", _DPM_SOLVER_TYPES),
    )
    return _exponential_rows(run, grid, list(updates), x0=algorithm == "dpmsolver++")


def uni_pc(run: Run) -> Rows:
    """UniPCMultistepScheduler."""
    config = run.config
    types = {"bh1": "bh1", "bh2": "bh2", **dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")}
    grid = exponential_grid(config, run.schedule, run.num_steps)
    updates = exponential_solvers.uni_pc(
        grid.levels,
        begin=run.begin,
        order=order(config, "solver_order", 3),
        predict_x0=config["predict_x0"],
        solver_type=choice(config, "solver_type", types),
        lower_order_final=config["lower_order_final"],
        disable_corrector=config["disable_corrector"],
    )
    return _exponential_rows(run, grid, list(updates), x0=config["predict_x0"])


def deis(run: Run) -> Rows:
    """DEISMultistepScheduler."""
    grid = exponential_grid(run.config, run.schedule, run.num_steps)
    updates = exponential_adams_solvers.deis(
        grid.levels,
        begin=run.begin,
        order=order(run.config, "solver_order", 3),
        lower_order_final=run.config["lower_order_final"],
    )
    return _exponential_rows(run, grid, list(updates), x0=False)


def sa_solver(run: Run) -> Rows:
    """SASolverScheduler, stochastic from timestep 800 down to 200, which is its default."""
    config = run.config
    types = {"data_prediction": True, "noise_prediction": False}
    x0 = choice(config, "algorithm_type", types)
    grid = exponential_grid(config, run.schedule, run.num_steps)
    updates = exponential_adams_solvers.sa_solver(
        grid.levels,
        begin=run.begin,
        taus=[1.0 if 200 <= timestep <= 800 else 0.0 for timestep in grid.timesteps],
        predictor_order=order(config, "predictor_order", 4),
        corrector_order=order(config, "corrector_order", 4),
        predict_x0=x0,
        lower_order_final=config["lower_order_final"],
    )
    rows = _exponential_rows(run, grid, list(updates), x0=x0, stochastic=True)
    # Its add_noise looks levels up by whole timesteps, also where the grid lies between them.
    return replace(rows, noised_levels=[run.schedule.level_at(int(t)) for t in rows.timesteps])


_DPM_SOLVER_TYPES = {
    "midpoint": "midpoint",
    "heun": "heun",
    **dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),  # other classes' types, as diffusers
}
_ALGORITHMS: Mapping[str, exponential_solvers.Algorithm] = {
    "dpmsolver": "dpmsolver",
    "dpmsolver++": "dpmsolver++",
    "sde-dpmsolver": "sde-dpmsolver",
    "sde-dpmsolver++": "sde-dpmsolver++",
    "deis": "dpmsolver++",
}


def _exponential_rows(
    run: Run, grid: Grid, updates: Sequence[Form], *, x0: bool, stochastic: bool = False
) -> Rows:
    return Rows(
        timesteps=grid.timesteps[run.begin :].tolist(),
        levels=grid.levels[run.begin :],
        conversion=x0_prediction if x0 else epsilon_prediction,
        updates=updates,
        draws_noise=[stochastic] * len(updates),
    )


def _dpm_solver_algorithm(config: Mapping[str, Any]) -> exponential_solvers.Algorithm:
    algorithm = choice(config, "algorithm_type", _ALGORITHMS)
    if not algorithm.endswith("++") and config["final_sigmas_type"] == "zero":
        raise ConfigError(
            f"algorithm_type {algorithm!r} cannot end at sigma 0",
            "Set final_sigmas_type to 'sigma_min', or algorithm_type to 'dpmsolver++'.",
        )
    return algorithm
