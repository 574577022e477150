"""The config keys that diffusers' scheduler classes know, and what they are where none says."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
SIGMAS: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": False}
_THRESHOLDING: dict[str, Any] = {"thresholding": False}
# diffusers' own default is True; StableDiffusionPipeline turns it off, for latents are not pixels.
_CLIP: dict[str, Any] = {"clip_sample": False}
_FLOW: dict[str, Any] = {"use_flow_sigmas": False}
_K_DIFFUSION = _COMMON | SIGMAS | {"beta_start": 0.00085, "beta_end": 0.012}
_DPM_SOLVER: dict[str, Any] = (
    _COMMON
    | SIGMAS
    | _THRESHOLDING
    | _FLOW
    | {
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    }
)
_DISTILLED: dict[str, Any] = (
    _COMMON
    | _THRESHOLDING
    | _CLIP
    | _ZERO_SNR
    | {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "original_inference_steps": 50,
        "set_alpha_to_one": True,
        "timestep_scaling": 10.0,
    }
)

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _COMMON
    | _THRESHOLDING
    | _CLIP
    | _ZERO_SNR
    | {"timestep_spacing": "leading", "set_alpha_to_one": True},
    "DDPMScheduler": _COMMON
    | _THRESHOLDING
    | _CLIP
    | _ZERO_SNR
    | {"timestep_spacing": "leading", "variance_type": "fixed_small"},
    "PNDMScheduler": _COMMON
    | {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
    "EulerDiscreteScheduler": _COMMON
    | SIGMAS
    | _ZERO_SNR
    | {
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": _COMMON | _ZERO_SNR,
    "HeunDiscreteScheduler": _K_DIFFUSION | _CLIP,
    "KDPM2DiscreteScheduler": _K_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": _K_DIFFUSION,
    "LMSDiscreteScheduler": _COMMON | SIGMAS,
    "DPMSolverMultistepScheduler": _DPM_SOLVER
    | _ZERO_SNR
    | {"euler_at_final": False, "use_lu_lambdas": False},
    "DPMSolverSinglestepScheduler": {
        key: value
        for key, value in (_DPM_SOLVER | {"lower_order_final": False}).items()
        if key not in ("timestep_spacing", "steps_offset")
    },
    "UniPCMultistepScheduler": _COMMON
    | SIGMAS
    | _THRESHOLDING
    | _FLOW
    | _ZERO_SNR
    | {
        "solver_order": 2,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
    },
    "DEISMultistepScheduler": _COMMON
    | SIGMAS
    | _THRESHOLDING
    | _FLOW
    | {"solver_order": 2, "lower_order_final": True},
    "SASolverScheduler": _COMMON
    | SIGMAS
    | _THRESHOLDING
    | _FLOW
    | {
        "predictor_order": 2,
        "corrector_order": 2,
        "tau_func": None,
        "algorithm_type": "data_prediction",
        "lower_order_final": True,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    },
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
}
"""Per class the config keys it knows, with its defaults."""
