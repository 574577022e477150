"""Solvers by their own laws: what must hold whatever the model is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sampler_oracle import V1_CONFIG
from sd_runtime.exponential_solvers import singlestep_orders
from sd_runtime.linear_form import NOISE, SAMPLE, history, rewind, substitute
from sd_runtime.noise_schedule import Level, level_from_sigma
from sd_runtime.scheduler_config import SCHEDULERS
from sd_runtime.solvers import ADAMS_BASHFORTH, adams_weights, ddim, ddpm, transfer
from sd_runtime.table import SchedulerTable, compile_table

LEVELS = [level_from_sigma(np.float64(sigma)) for sigma in (14.6, 5.0, 1.0, 0.2, 0.0)]
# These end at the noise of the first training timestep, or make of x₀ something of their own.
NOT_AT_ZERO = ("PNDM", "pndm", "plms", "LCM", "lcm", "TCD", "tcd", "DEIS", "deis", "SA", "sa")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_model_that_knows_the_picture_gets_it(name: str) -> None:
    config = {**V1_CONFIG, "set_alpha_to_one": True, "prediction_type": "sample"}
    table = compile_table(config, scheduler=name, num_inference_steps=7)
    picture = np.array([0.3, -1.2, 2.0])
    rng = np.random.default_rng(0)
    sample = table.init_noise_scale * rng.standard_normal(3)
    final = run_with_output(table, sample, picture, rng)
    if name.startswith(NOT_AT_ZERO):
        assert np.abs(final - picture).max() < 6 * table.sigma[-1] + 0.01
    else:
        np.testing.assert_allclose(final, picture, atol=1e-12)


def run_with_output(
    table: SchedulerTable,
    sample: np.ndarray,
    output: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    past = [np.zeros_like(sample)] * table.coef_history.shape[1]
    for row in range(table.num_rows):
        past = [table.pred_sample[row] * sample + table.pred_output[row] * output, *past[:-1]]
        sample = table.coef_sample[row] * sample + table.coef_history[row] @ np.array(past)
        if table.draws_noise[row]:
            sample = sample + table.coef_noise[row, 0] * rng.standard_normal(sample.shape)
    return sample


def test_euler_ancestral_is_ddim_with_eta_one_is_ddpm() -> None:
    steps = list(itertools.pairwise(LEVELS))
    for stochastic_ddim, ancestral in zip(
        ddim(steps, eta=1.0), ddpm(steps, fixed_large=False), strict=True
    ):
        np.testing.assert_allclose(stochastic_ddim, ancestral, atol=1e-14)


@pytest.mark.parametrize(
    "name",
    [
        "dpm++_1s",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_first_orders_are_euler(name: str) -> None:
    config = {**V1_CONFIG, "solver_order": 1, "disable_corrector": list(range(9))}
    table = compile_table(config, scheduler=name, num_inference_steps=9)
    for row in range(9):
        source = Level(table.alpha[row], table.sigma[row])
        target = Level(table.alpha[row + 1], table.sigma[row + 1])
        if name.startswith("DEIS"):
            expected = transfer(SAMPLE, history(0), source, target)
        else:
            (expected,) = ddim([(source, target)], eta=0.0)
        assert table.coef_sample[row] == pytest.approx(expected[0])
        assert table.coef_history[row, 0] == pytest.approx(expected[1])


def test_stochastic_samplers_keep_the_variance() -> None:
    # With x₀ = 0 known, a sample of variance sigma² must leave every step with the next sigma².
    for name in ("euler_a", "ddpm", "dpm++_2m_sde", "lcm"):
        config = {**V1_CONFIG, "solver_order": 1, "set_alpha_to_one": True}
        table = compile_table(config, scheduler=name, num_inference_steps=10)
        variance = table.coef_sample**2 * table.sigma[:-1] ** 2 + table.coef_noise[:, 0] ** 2
        np.testing.assert_allclose(variance, table.sigma[1:] ** 2, atol=1e-5)


def test_rewinding_an_update_gives_its_start() -> None:
    update = 0.7 * SAMPLE + 0.2 * history(0) - 0.4 * history(1) + 0.1 * NOISE
    start = rewind(update)
    values = {"sample": 1.5, "h0": 0.3, "h1": -2.0, "noise": 0.9}
    after = 0.7 * 1.5 + 0.2 * 0.3 + 0.4 * 2.0 + 0.1 * 0.9
    state = np.zeros_like(update)
    state[0], state[2], state[3], state[-1] = after, values["h0"], values["h1"], values["noise"]
    assert start @ state == pytest.approx(values["sample"])
    np.testing.assert_allclose(substitute(SAMPLE, start), start)


def test_adams_weights_at_equal_distances_are_adams_bashforth() -> None:
    for weights in ADAMS_BASHFORTH:
        nodes = [np.float64(-age) for age in range(len(weights))]
        ours = adams_weights(nodes, np.float64(0), np.float64(1))
        np.testing.assert_allclose(ours, weights, rtol=1e-12)


def test_adams_weights_integrate_polynomials_times_the_exponential() -> None:
    nodes = [np.float64(node) for node in (0.5, 0.1, -0.7)]
    ours = adams_weights(nodes, np.float64(0.5), np.float64(2.0), rate=1.0)
    # ∫ u² eᵘ du = (u² − 2u + 2) eᵘ
    exact = (4 - 4 + 2) * np.exp(2.0) - (0.25 - 1 + 2) * np.exp(0.5)
    assert ours @ np.square(nodes) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("num_steps", range(1, 12))
def test_singlestep_orders_use_every_step(num_steps: int, order: int) -> None:
    orders = singlestep_orders(num_steps, order, lower_order_final=True)
    assert len(orders) == num_steps
    assert orders[0] == 1
    assert all(later in (1, earlier + 1) for earlier, later in itertools.pairwise(orders))
