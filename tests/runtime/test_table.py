"""Tables against unmodified diffusers schedulers, every name of them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import diffusers
import numpy as np
import pytest

from sampler_oracle import V1_CONFIG, relative_difference, run_table
from sd_engines.errors import ConfigError
from sd_runtime.scheduler_config import (
    REFUSED,
    SCHEDULERS,
    effective_config,
    scheduler_name,
)
from sd_runtime.scheduler_defaults import DEFAULTS
from sd_runtime.table import compile_table

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

# The class names mean no other samplers: each class by its defaults has a short name as well.
SHORT_NAMES = [name for name in SCHEDULERS if name not in DEFAULTS]
TOLERANCE = 1e-5
# Here diffusers' own float32 coefficients are that far from their float64 values; those agree with
# ours, see test_what_diffusers_rounds. (At 2 steps KDPM2 ancestral's sigma_down has 3 digits left.)
ROUNDING_OF_DIFFUSERS = {
    **{(name, 2): 1e-4 for name in SHORT_NAMES if name.startswith("dpm2_a")},
    ("dpm++_3m_sde_beta", 20): 1e-4,
    ("dpm++_3m_sde_beta", 50): 5e-4,
    ("deis_beta", 50): 1e-4,
}
V_PREDICTION = {**V1_CONFIG, "prediction_type": "v_prediction"}
# No oracle: diffusers leaves "sample" out of these.
NO_SAMPLE_PREDICTION = (
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)


@pytest.mark.parametrize("class_name", DEFAULTS)
def test_class_by_its_defaults_has_a_short_name(class_name: str) -> None:
    config = effective_config(V1_CONFIG, class_name)
    assert any(effective_config(V1_CONFIG, name) == config for name in SHORT_NAMES)


@pytest.mark.parametrize("num_inference_steps", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("name", SHORT_NAMES)
def test_every_name(name: str, num_inference_steps: int) -> None:
    tolerance = ROUNDING_OF_DIFFUSERS.get((name, num_inference_steps), TOLERANCE)
    assert relative_difference(V1_CONFIG, name, num_inference_steps) <= tolerance


@pytest.mark.parametrize("name", ["dpm++_3m_sde_beta", "deis_beta", "heun", "unipc", "sa"])
@pytest.mark.parametrize("num_inference_steps", [20, 50])
def test_what_diffusers_rounds(name: str, num_inference_steps: int) -> None:
    assert relative_difference(V1_CONFIG, name, num_inference_steps, float64=True) <= TOLERANCE


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("class_name", "prediction_type"),
    [
        (class_name, prediction_type)
        for class_name in DEFAULTS
        for prediction_type in ("epsilon", "sample", "v_prediction")
        if not (prediction_type == "sample" and class_name in NO_SAMPLE_PREDICTION)
    ],
)
def test_every_class_prediction_and_spacing(
    class_name: str, prediction_type: str, spacing: str
) -> None:
    config = {**V1_CONFIG, "prediction_type": prediction_type, "timestep_spacing": spacing}
    for num_inference_steps in (1, 5, 20):
        assert relative_difference(config, class_name, num_inference_steps) <= TOLERANCE


@pytest.mark.parametrize("class_name", [n for n in DEFAULTS if n[:3] not in ("LCM", "TCD")])
def test_trailing_steps_are_as_many_as_asked_for(class_name: str) -> None:
    """Sixty-one of 1000/61 add up to a little less than 1000: diffusers takes one more, at −1.

    There its timesteps are more than its sigmas, or are looked up from the noisy end.
    """
    config = {**V1_CONFIG, "timestep_spacing": "trailing"}
    before, table, after = (
        compile_table(config, scheduler=class_name, num_inference_steps=steps)
        for steps in (60, 61, 62)
    )
    assert table.num_rows - before.num_rows == after.num_rows - table.num_rows
    assert len(table.coef_sample) == table.num_rows
    assert before.timesteps.min() >= table.timesteps.min() >= after.timesteps.min()
    if not table.draws_noise.any():
        pictures = [run_table(table) for table in (before, table)]
        assert np.linalg.norm(pictures[1] - pictures[0]) <= 0.05 * np.linalg.norm(pictures[0])


@pytest.mark.parametrize(
    "schedule",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"trained_betas": np.linspace(0.0002, 0.015, 1000).tolist()},
        {"set_alpha_to_one": True, "steps_offset": 0},
    ],
    ids=lambda schedule: "+".join(schedule),
)
@pytest.mark.parametrize("class_name", DEFAULTS)
def test_every_class_and_noise_schedule(class_name: str, schedule: dict[str, Any]) -> None:
    for num_inference_steps in (5, 20):
        config = {**V1_CONFIG, **schedule}
        assert relative_difference(config, class_name, num_inference_steps) <= TOLERANCE


@pytest.mark.parametrize("class_name", [name for name in DEFAULTS if "Ancestral" not in name])
def test_cosine_schedule(class_name: str) -> None:
    # It starts at sigma 20,000, where float32 k-diffusion samples keep few digits of x₀.
    config = {**V1_CONFIG, "beta_schedule": "squaredcos_cap_v2"}
    assert relative_difference(config, class_name, 20, float64=True) <= TOLERANCE


@pytest.mark.parametrize(
    "class_name",
    [name for name, known in DEFAULTS.items() if "rescale_betas_zero_snr" in known],
)
def test_zero_terminal_snr(class_name: str) -> None:
    # 1e-4: torch's float32 sqrt is a bit off on some machines, and the rescaling amplifies it.
    config = {**V_PREDICTION, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for num_inference_steps in (5, 20):
        assert relative_difference(config, class_name, num_inference_steps) <= 1e-4


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.75])
@pytest.mark.parametrize("class_name", DEFAULTS)
def test_image_to_image(class_name: str, strength: float) -> None:
    assert relative_difference(V1_CONFIG, class_name, 20, strength=strength) <= TOLERANCE


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_image_to_image_by_every_name(name: str) -> None:
    assert relative_difference(V1_CONFIG, name, 10, strength=0.6) <= TOLERANCE


def test_image_to_image_between_the_trained_levels() -> None:
    """SA-Solver adds noise by whole timesteps, its sigmas lie between them."""
    config = {**V1_CONFIG, "use_karras_sigmas": True}
    assert relative_difference(config, "sa", 10, strength=0.6) <= TOLERANCE


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("name", ["ddim", "tcd", "euler"])
def test_eta(name: str, eta: float) -> None:
    assert relative_difference(V1_CONFIG, name, 10, eta=eta) <= TOLERANCE
    assert relative_difference(V1_CONFIG, name, 10, eta=eta, strength=0.5) <= TOLERANCE


DPM_SOLVER = [
    {
        "algorithm_type": algorithm,
        "solver_order": order,
        "solver_type": solver_type,
        "final_sigmas_type": final,
        "lower_order_final": low,
    }
    for algorithm in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
    for order in (1, 2, 3)
    for solver_type in ("midpoint", "heun")
    for final in ("zero", "sigma_min")
    for low in (True, False)
    if (final == "sigma_min" or algorithm.endswith("++"))
    and not (algorithm == "sde-dpmsolver" and order == 3)
]


@pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning")
@pytest.mark.parametrize(
    "options", DPM_SOLVER, ids=["-".join(map(str, options.values())) for options in DPM_SOLVER]
)
def test_dpm_solver_options(options: dict[str, Any]) -> None:
    config = {**V1_CONFIG, **options}
    stochastic = options["algorithm_type"].startswith("sde")
    for num_inference_steps in (7, 20):
        for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"):
            if name.startswith("DPMSolverSinglestep") and stochastic:
                continue
            assert relative_difference(config, name, num_inference_steps) <= TOLERANCE


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_options(order: int, solver_type: str, predict_x0: bool) -> None:
    for low in (True, False):
        for disable_corrector in ([], [0, 3]):
            config = {
                **V1_CONFIG,
                "solver_order": order,
                "solver_type": solver_type,
                "predict_x0": predict_x0,
                "final_sigmas_type": "sigma_min",
                "lower_order_final": low,
                "disable_corrector": disable_corrector,
            }
            for num_inference_steps in (2, 7, 20):
                difference = relative_difference(
                    config, "UniPCMultistepScheduler", num_inference_steps
                )
                assert difference <= TOLERANCE


@pytest.mark.parametrize("algorithm_type", ["data_prediction", "noise_prediction"])
@pytest.mark.parametrize("corrector_order", [1, 2, 3, 4])
@pytest.mark.parametrize("predictor_order", [1, 2, 3, 4])
def test_sa_solver_options(predictor_order: int, corrector_order: int, algorithm_type: str) -> None:
    config = {
        **V1_CONFIG,
        "predictor_order": predictor_order,
        "corrector_order": corrector_order,
        "algorithm_type": algorithm_type,
    }
    assert relative_difference(config, "sa", 3, float64=True) <= TOLERANCE
    assert relative_difference(config, "sa", 20, float64=True) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deis", {"solver_order": 1}),
        ("deis", {"solver_order": 3}),
        ("deis", {"solver_order": 3, "lower_order_final": False}),
        ("pndm", {"skip_prk_steps": False}),
        ("pndm", {"skip_prk_steps": False, "prediction_type": "v_prediction"}),
        ("ddpm", {"variance_type": "fixed_small_log"}),
        ("ddpm", {"variance_type": "fixed_large"}),
        ("ddpm", {"variance_type": "fixed_large", "steps_offset": 0}),  # which ends at timestep 0
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("euler", {"interpolation_type": "log_linear"}),
        ("euler_karras", {"sigma_min": 0.1, "sigma_max": 10.0}),
        ("dpm++_2m_karras", {"sigma_min": 0.1, "sigma_max": 10.0}),
        ("lms_karras", {"sigma_min": 0.1, "sigma_max": 10.0}),
        ("lms_exponential", {"sigma_min": 0.1, "sigma_max": 10.0}),
        ("lms_beta", {"sigma_min": 0.1, "sigma_max": 10.0}),
        ("dpm++_2m_karras", {"beta_schedule": "squaredcos_cap_v2"}),
        ("dpm++_2m", {"use_lu_lambdas": True}),
        ("dpm++_2m", {"lambda_min_clipped": -2.0}),
        ("dpm++_2m", {"lambda_min_clipped": -2.0, "timestep_spacing": "leading"}),
        ("dpm++_2m", {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing"}),
        ("dpm++_3m_sde", {"lambda_min_clipped": -1.0, "timestep_spacing": "trailing"}),
        ("sa", {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing"}),
        ("dpm++_2m", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
        ("dpm++_2m", {"solver_type": "bh2", "algorithm_type": "deis"}),
        ("lcm", {"original_inference_steps": 100, "timestep_scaling": 5.0}),
        ("lcm", {"timestep_scaling": 0.001}),  # so small that the sample counts beside x₀
    ],
)
def test_options(name: str, options: dict[str, Any]) -> None:
    for num_inference_steps in (4, 5, 20):
        difference = relative_difference({**V1_CONFIG, **options}, name, num_inference_steps)
        assert difference <= TOLERANCE


def test_stochastic_rows_say_when_diffusers_draws() -> None:
    def draws(name: str, **options: Any) -> list[bool]:
        table = compile_table(V1_CONFIG, scheduler=name, num_inference_steps=3, **options)
        assert table.coef_noise.shape == (table.num_rows, 1 if any(table.draws_noise) else 0)
        return table.draws_noise.tolist()

    assert draws("euler") == [False] * 3
    assert draws("euler_a") == [True] * 3
    assert draws("dpm2_a") == [False, True, False, True, False]
    assert draws("ddim") == [False] * 3
    assert draws("ddim", eta=0.5) == [True] * 3
    assert draws("lcm") == [True, True, False]
    assert draws("sa") == [True] * 3


def test_rows_and_levels() -> None:
    table = compile_table(V1_CONFIG, num_inference_steps=50)
    assert table.num_rows == 51
    assert table.timesteps[:4].tolist() == [981, 961, 961, 941]
    assert table.alpha.shape == table.sigma.shape == (52,)
    np.testing.assert_allclose(table.alpha**2 + table.sigma**2, 1)
    assert table.coef_history.shape == (51, 5)
    assert all(
        getattr(table, field).dtype == np.float64
        for field in ("timesteps", "pred_sample", "coef_sample", "coef_history", "alpha", "sigma")
    )
    assert compile_table(V1_CONFIG, scheduler="heun", num_inference_steps=5).num_rows == 9


def test_start_of_text_to_image() -> None:
    leading = {**V1_CONFIG, "timestep_spacing": "leading"}
    assert compile_table(V1_CONFIG, num_inference_steps=5).init_noise_scale == 1
    assert compile_table(leading, scheduler="euler", num_inference_steps=5).init_noise_scale == 1
    euler = compile_table(V1_CONFIG, scheduler="euler", num_inference_steps=5)
    assert euler.init_noise_scale == euler.sigma[0] < 1


@pytest.mark.parametrize("class_name", DEFAULTS)
def test_configs_are_read_as_from_config_reads_them(class_name: str) -> None:
    cls = getattr(diffusers, class_name)
    keys = set(inspect.signature(cls.__init__).parameters) - {"self"}
    without_effect = {
        "clip_sample_range",
        "dynamic_thresholding_ratio",
        "flow_shift",
        "sample_max_value",
        "shift_terminal",
        "sigma_max",
        "sigma_min",
        "time_shift_type",
        "use_dynamic_shifting",
        *({"solver_type", "algorithm_type"} if class_name == "DEISMultistepScheduler" else ()),
    }
    assert keys - without_effect <= DEFAULTS[class_name].keys() <= keys
    for config in (V1_CONFIG, {"_class_name": "PNDMScheduler"}):
        theirs = cls.from_config(config).config
        ours = effective_config(config, class_name)
        for key in DEFAULTS[class_name].keys() - {"clip_sample"}:
            assert ours[key] == theirs[key], key


def test_short_names_carry_the_checkpoints_config() -> None:
    config = effective_config({**V1_CONFIG, "use_karras_sigmas": True}, "dpm++_2m_sde_beta")
    assert config["algorithm_type"] == "sde-dpmsolver++"
    assert (config["use_karras_sigmas"], config["use_beta_sigmas"]) == (False, True)
    assert config["beta_schedule"] == "scaled_linear"
    other = effective_config({**V1_CONFIG, "algorithm_type": "x"}, "dpm++_2s")
    assert other["algorithm_type"] == "dpmsolver++"
    assert config["lambda_min_clipped"] == -math.inf


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("DPM++ 2M Karras", "dpm++_2m_karras"),
        ("Euler-a", "euler_a"),
        ("pndmscheduler", "PNDMScheduler"),
        ("DDIMScheduler", "DDIMScheduler"),
    ],
)
def test_names_are_forgiving(written: str, name: str) -> None:
    assert scheduler_name(written) == name


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown scheduler 'eulr_a'") as caught:
        scheduler_name("eulr_a")
    assert "Did you mean 'euler_a'?" in caught.value.hint


@pytest.mark.parametrize("name", [*REFUSED, "dpm++_sde", "dpm++_sde_karras"])
def test_samplers_without_a_table_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"not supported: it "):
        compile_table(V1_CONFIG, scheduler=name, num_inference_steps=5)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("ddim", {"thresholding": True}, "thresholding"),
        ("ddim", {"clip_sample": True}, "clip_sample"),
        ("ddpm", {"variance_type": "learned_range"}, "learned_range"),
        ("ddpm", {"variance_type": "fixed_large_log"}, "fixed_large_log"),
        ("dpm++_2m", {"use_flow_sigmas": True}, "flow-matching"),
        ("dpm++_2m", {"solver_type": "trapezoid"}, "trapezoid"),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order 4"),
        ("DPMSolverSinglestepScheduler", {"solver_order": 4}, "solver_order 4"),
        ("deis", {"solver_order": 4}, "solver_order 4"),
        (
            "DPMSolverMultistepScheduler",
            {
                "algorithm_type": "sde-dpmsolver",
                "solver_order": 3,
                "final_sigmas_type": "sigma_min",
            },
            "solver_order 3",
        ),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "euler"}, "euler"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "sigma 0"),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "earlier ones"),
        ("dpm++_2m", {"lower_order_final": "yes"}, "lower_order_final is 'yes'"),
        ("ddim", {"beta_start": "0.1"}, "beta_start is '0.1'"),
        ("ddim", {"num_train_timesteps": 1e3}, "num_train_timesteps is 1000.0"),
        ("ddim", {"num_train_timesteps": True}, "num_train_timesteps is True"),
        ("unipc", {"solver_p": {}}, "solver_p"),
        ("unipc", {"lower_order_final": False}, "divides by zero"),
        ("unipc", {"lower_order_final": False, "solver_order": 3}, "divides by zero"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "zero"),
        ("euler", {"timestep_type": "continuous"}, "EDM"),
        ("euler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "more than one"),
        ("euler", {"prediction_type": "flow_prediction"}, "flow_prediction"),
        ("euler", {"timestep_spacing": "even"}, "even"),
        ("euler", {"beta_schedule": "sigmoid"}, "sigmoid"),
        ("pndm", {"skip_prk_steps": False, "num_train_timesteps": 3}, "out of range"),
        ("lcm", {"original_inference_steps": 4}, "distillation"),
        ("lcm", {"original_inference_steps": 2000}, "2000"),
        ("ddim", {"steps_offset": 500, "timestep_spacing": "leading"}, "past the last"),
    ],
)
def test_what_no_table_can_hold_is_refused(name: str, options: dict[str, Any], word: str) -> None:
    config = {**V1_CONFIG, **options}
    with pytest.raises(ConfigError, match=word) as caught:
        compile_table(config, scheduler=name, num_inference_steps=5)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps 1001"),
        ({"num_inference_steps": 5, "eta": 1.5}, "eta"),
        ({"num_inference_steps": 5, "strength": -0.1}, "strength"),
        ({"num_inference_steps": 5, "strength": 0.1}, "leaves none"),
        ({"num_inference_steps": 5, "eta": math.nan}, "eta"),
    ],
)
def test_requests_out_of_range(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        compile_table(V1_CONFIG, scheduler="ddim", **options)


def test_a_clipped_schedule_has_no_steps_for_a_small_strength() -> None:
    config = {**V1_CONFIG, "lambda_min_clipped": -2.0, "timestep_spacing": "trailing"}
    assert relative_difference(config, "dpm++_2m", 12, strength=0.5) <= TOLERANCE
    for name in ("dpm++_2m", "dpm++_3m_sde", "sa"):
        assert compile_table(config, scheduler=name, num_inference_steps=12).num_rows < 12
        with pytest.raises(ConfigError, match="leaves none"):
            compile_table(config, scheduler=name, num_inference_steps=12, strength=0.1)


def test_runge_kutta_warm_up_needs_its_steps() -> None:
    config = {**V1_CONFIG, "skip_prk_steps": False}
    with pytest.raises(ConfigError, match="at least 4"):
        compile_table(config, num_inference_steps=3)
    with pytest.raises(ConfigError, match="strength 1"):
        compile_table(config, num_inference_steps=20, strength=0.5)
