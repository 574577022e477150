"""Noise schedules and sigma spacings against diffusers and SciPy."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.stats

from sampler_oracle import V1_CONFIG
from sd_engines.errors import ConfigError
from sd_runtime.noise_schedule import Level, NoiseSchedule, level_from_sigma, noise_schedule
from sd_runtime.scheduler_config import effective_config
from sd_runtime.table import compile_table
from sd_runtime.timestep_spacing import beta_quantile, timesteps_from_sigmas

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def schedule(name: str = "ddim", **options: Any) -> NoiseSchedule:
    return noise_schedule(effective_config({**V1_CONFIG, **options}, name), min_alpha_cumprod=0.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        {"num_train_timesteps": 77},
        {"num_train_timesteps": 1},
    ],
)
def test_alphas_cumprod_are_diffusers_to_the_last_bit(options: dict[str, Any]) -> None:
    expected = diffusers.DDIMScheduler.from_config({**V1_CONFIG, **options}).alphas_cumprod
    np.testing.assert_array_equal(schedule(**options).alphas_cumprod, expected.numpy())


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("num_train_timesteps", (0, -1, 10**9, 10**30)),
        ("beta_start", (-1, 0, 1e-9, 1, math.nan)),
        ("beta_end", (-1, 0, 2.0, 10**400)),
        ("trained_betas", ("x", {}, [], [0.5], [0.5] * 5, [0.1, 0.2, 0.3, 1], [[0.5]] * 4)),
        ("sigma_min", ("x", 0, -1, [])),
        ("sigma_max", (True, math.inf, 10**400)),
        ("steps_offset", (-1, 5, 10**39, 10**400)),
        ("original_inference_steps", (0, 5, -(10**400))),
        ("timestep_scaling", (-1, math.nan, math.inf, 10**400)),
    ],
)
def test_what_no_schedule_of_noise_can_have(key: str, values: tuple[Any, ...]) -> None:
    config = {**V1_CONFIG, "num_train_timesteps": 4, "original_inference_steps": 4}
    for value in values:
        with pytest.raises(ConfigError, match=f"the scheduler config's {key} is ") as caught:
            effective_config({**config, key: value}, "lcm")
        assert key in caught.value.hint
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", [None, 3, [], {}])
def test_a_class_that_is_no_name(name: Any) -> None:
    with pytest.raises(ConfigError, match="unknown scheduler"):
        compile_table({**V1_CONFIG, "_class_name": name}, num_inference_steps=2)


def test_zero_terminal_snr() -> None:
    options = {"rescale_betas_zero_snr": True}
    expected = diffusers.DDIMScheduler.from_config({**V1_CONFIG, **options}).alphas_cumprod
    rescaled = schedule(**options).alphas_cumprod
    assert rescaled[-1] == 0
    np.testing.assert_allclose(rescaled, expected.numpy(), rtol=1e-5)


def test_levels() -> None:
    own = schedule()
    level = own.level_at(500)
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1)
    assert level.noise_to_signal == pytest.approx(own.sigmas[500])
    assert own.level_at(-5).alpha ** 2 == pytest.approx(own.alphas_cumprod[0])
    assert schedule(set_alpha_to_one=True).level_at(-5) == (1, 0)
    with pytest.raises(ConfigError, match="timestep 1000"):
        own.level_at(1000)


def test_level_without_noise_is_at_infinity() -> None:
    level = level_from_sigma(np.float64(0))
    assert level == Level(np.float64(1), np.float64(0))
    with np.errstate(divide="ignore"):
        assert level.half_log_snr == np.inf


@pytest.mark.parametrize("shape", [0.3, 0.6, 1.0])
def test_beta_quantile(shape: float) -> None:
    probability = np.concatenate([[0.0, 1.0, 0.5, 1e-6], np.linspace(0, 1, 333)])
    expected = scipy.stats.beta.ppf(probability, shape, shape)
    np.testing.assert_allclose(beta_quantile(probability, shape), expected, rtol=1e-9, atol=1e-300)


def test_timesteps_from_sigmas() -> None:
    sigmas = schedule().sigmas
    middle = np.sqrt(sigmas[10].astype(np.float64) * sigmas[11])
    timesteps = timesteps_from_sigmas(np.array([1e9, sigmas[500], middle, 0.0]), sigmas)
    np.testing.assert_allclose(timesteps, [999, 500, 10.5, 0], atol=1e-4)
