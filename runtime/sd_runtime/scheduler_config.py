"""Scheduler names, and what a checkpoint's config means to each: diffusers' ``from_config``.

A class takes from the checkpoint's config the keys that it knows and its own defaults for the rest;
a short name is a class with a few keys set.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sd_engines.errors import ConfigError, nearest
from sd_engines.spec import (
    LDM3D_UPSCALER,
    MAX_TRAIN_TIMESTEPS,
    STABLE_DIFFUSION_XL,
    X2_UPSCALER,
    X4_UPSCALER,
)
from sd_runtime.option_values import shown
from sd_runtime.scheduler_defaults import DEFAULTS, SIGMAS

if TYPE_CHECKING:
    from collections.abc import Mapping

Choice = TypeVar("Choice")

REFUSED: dict[str, str] = {
    "DPMSolverSDEScheduler": "it draws its noise from a Brownian tree, not from the seed's stream",
    "EDMEulerScheduler": "it scales the UNet's input and output as EDM models want, not as v1 does",
    "EDMDPMSolverMultistepScheduler": "it scales the UNet's input and output as EDM models want",
    "CosineDPMSolverMultistepScheduler": "it scales the UNet's input and output as EDM models want",
    "FlowMatchEulerDiscreteScheduler": "it is for flow-matching models",
    "FlowMatchHeunDiscreteScheduler": "it is for flow-matching models",
    "FlowMatchLCMScheduler": "it is for flow-matching models",
    "IPNDMScheduler": "it has its own noise schedule, which no v1 model was trained on",
}
_LEAST_BETA = 2.0**-24
"""One less a smaller number is one in float32: a timestep without noise."""


@dataclass(frozen=True)
class Sampler:
    """A scheduler class, and the config keys that a short name sets on top of the checkpoint's."""

    class_name: str
    overrides: Mapping[str, Any]


def _names() -> dict[str, Sampler]:
    multistep, singlestep = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
    sde = {"algorithm_type": "sde-dpmsolver++"}
    ode = {"algorithm_type": "dpmsolver++"}
    spaced = {  # these take sigma spacings too
        "euler": Sampler("EulerDiscreteScheduler", {}),
        "heun": Sampler("HeunDiscreteScheduler", {}),
        "dpm2": Sampler("KDPM2DiscreteScheduler", {}),
        "dpm2_a": Sampler("KDPM2AncestralDiscreteScheduler", {}),
        "lms": Sampler("LMSDiscreteScheduler", {}),
        "dpm++_2m": Sampler(multistep, ode | {"solver_order": 2}),
        "dpm++_3m": Sampler(multistep, ode | {"solver_order": 3}),
        "dpm++_2m_sde": Sampler(multistep, sde | {"solver_order": 2}),
        "dpm++_3m_sde": Sampler(multistep, sde | {"solver_order": 3}),
        "dpm++_1s": Sampler(singlestep, ode | {"solver_order": 1}),
        "dpm++_2s": Sampler(singlestep, ode | {"solver_order": 2}),
        "dpm++_3s": Sampler(singlestep, ode | {"solver_order": 3}),
        "unipc": Sampler("UniPCMultistepScheduler", {}),
        "deis": Sampler("DEISMultistepScheduler", {}),
        "sa": Sampler("SASolverScheduler", {}),
    }
    spacings = ("karras", "exponential", "beta")
    variants = {
        f"{name}_{spacing}": Sampler(
            sampler.class_name,
            {
                **sampler.overrides,
                **{f"use_{other}_sigmas": other == spacing for other in spacings},
            },
        )
        for name, sampler in spaced.items()
        for spacing in spacings
    }
    return {
        "ddim": Sampler("DDIMScheduler", {}),
        "ddpm": Sampler("DDPMScheduler", {}),
        "pndm": Sampler("PNDMScheduler", {}),
        "plms": Sampler("PNDMScheduler", {"skip_prk_steps": True}),
        "euler_a": Sampler("EulerAncestralDiscreteScheduler", {}),
        "euler_ancestral": Sampler("EulerAncestralDiscreteScheduler", {}),
        "lcm": Sampler("LCMScheduler", {}),
        "tcd": Sampler("TCDScheduler", {}),
        **spaced,
        **variants,
        **{class_name: Sampler(class_name, {}) for class_name in DEFAULTS},
    }


SCHEDULERS: Mapping[str, Sampler] = _names()
"""Every scheduler by name: diffusers' class names and the usual short ones."""


def is_scheduler(name: str) -> bool:
    """Whether `scheduler_name` takes ``name``."""
    return _folded(name) in _KNOWN


def scheduler_name(name: str) -> str:
    """The key of `SCHEDULERS` that ``name`` means, whatever its case, spaces or hyphens.

    ConfigError for an unknown name, naming the nearest, and for those that no table can hold.
    """
    if not isinstance(name, str):  # a config's may be anything
        raise ConfigError(f"unknown scheduler {name!r}", nearest("", SCHEDULERS))
    folded = _folded(name)
    if folded in _KNOWN:
        return _KNOWN[folded]
    reason = _REASONS.get(folded.removesuffix("_karras"))
    if reason is not None:
        raise ConfigError(
            f"scheduler {name!r} is not supported: {reason}",
            f"Use another; known: {', '.join(sorted(SCHEDULERS))}.",
        )
    raise ConfigError(f"unknown scheduler {name!r}", nearest(folded, SCHEDULERS))


def pipeline_scheduler_config(
    scheduler_config: Mapping[str, Any], *, family: str
) -> dict[str, Any]:
    """The config as diffusers' pipeline of the ``family`` corrects it.

    Latents are not pixels, so nothing clips them. Leading timesteps start at 1, as in training,
    whatever a checkpoint says; of Stable Diffusion XL and of upscalers diffusers takes its word.
    """
    if family in (STABLE_DIFFUSION_XL, X2_UPSCALER, X4_UPSCALER, LDM3D_UPSCALER):
        return {**scheduler_config, "clip_sample": False}
    return {**scheduler_config, "clip_sample": False, "steps_offset": 1}


def effective_config(scheduler_config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config that diffusers' class of ``name`` would have, from the checkpoint's.

    As ``Class.from_config(scheduler_config, **overrides)``. ``_class_name`` is the class's. A
    checkpoint's sigma_min and sigma_max are kept, for diffusers reads them whatever the class.
    ConfigError for a class or setting that is no linear sampler.
    """
    sampler = SCHEDULERS[scheduler_name(name)]
    known = DEFAULTS[sampler.class_name]
    bounds = {key: scheduler_config.get(key) for key in ("sigma_min", "sigma_max")}
    carried = {key: value for key, value in scheduler_config.items() if key in known}
    config = {**known, **bounds, **carried, **sampler.overrides, "_class_name": sampler.class_name}
    for key, value in carried.items():
        _check_type(key, value, known[key])
    _check_noise(config)
    _refuse_nonlinear(config)
    return config


def choice(config: Mapping[str, Any], key: str, choices: Mapping[str, Choice]) -> Choice:
    """What the setting stands for; ConfigError for a value that is none of ``choices``."""
    value = config[key]
    if value not in choices:
        raise ConfigError(f"{key} {value!r} is not supported", nearest(str(value), choices))
    return choices[value]


def order(config: Mapping[str, Any], key: str, highest: int) -> int:
    """The setting, a whole number; ConfigError unless it is 1 … ``highest``."""
    value = config[key]
    if not 1 <= value <= highest:
        raise ConfigError(f"{key} {value} is out of range", f"Give it from 1 to {highest}.")
    return int(value)


def _refuse_nonlinear(config: Mapping[str, Any]) -> None:
    for key in ("thresholding", "clip_sample"):
        if config.get(key):
            raise ConfigError(
                f"the scheduler config sets {key}, which clips what the model predicts",
                f"Set {key} to false in the checkpoint's scheduler_config.json: latents are not "
                "pixels, and Stable Diffusion is sampled without it.",
            )
    if config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous":
        raise ConfigError(
            "the scheduler config is for a flow-matching or EDM model",
            "Only models trained on noise with alphas_cumprod can be sampled.",
        )
    if str(config.get("variance_type")).startswith("learned"):
        raise ConfigError(
            f"variance_type {config['variance_type']!r} needs a UNet that predicts the variance",
            "Set it to 'fixed_small', or choose another scheduler.",
        )
    for key in ("solver_p", "tau_func"):
        if config.get(key) is not None:
            raise ConfigError(f"the scheduler config sets {key}", f"Remove {key}: it is code.")
    if sum(bool(config.get(key)) for key in SIGMAS) > 1:
        raise ConfigError(
            "the scheduler config sets more than one of " + ", ".join(SIGMAS),
            "Keep one of them.",
        )


def _check_type(key: str, value: object, default: object) -> None:
    """ConfigError for a value of another kind than the class's default; null means false."""
    kinds: tuple[type, ...] = (type(default),)
    if isinstance(default, bool):
        kinds = (bool, type(None))
    elif isinstance(default, float):
        kinds = (float, int)
    elif default is None:
        return
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _wrong(key, value, f"is of type {kinds[0].__name__}, such as {default!r}")


def _check_noise(config: Mapping[str, Any]) -> None:
    """ConfigError for what no schedule of noise can have."""
    length, betas = config["num_train_timesteps"], config["trained_betas"]
    if not 1 <= length <= MAX_TRAIN_TIMESTEPS:
        raise _wrong("num_train_timesteps", length, f"goes from 1 to {MAX_TRAIN_TIMESTEPS}")
    for key in ("beta_start", "beta_end"):
        if not _LEAST_BETA <= config[key] < 1:
            raise _wrong(key, config[key], f"lies between {_LEAST_BETA:.1g} and 1")
    if betas is not None and not (
        isinstance(betas, list | tuple)
        and len(betas) == length
        and all(_is_number(beta) and _LEAST_BETA <= beta < 1 for beta in betas)
    ):
        numbers = f"{length} numbers between {_LEAST_BETA:.1g} and 1"
        raise _wrong("trained_betas", betas, f"is null, or {numbers}, one a training timestep")
    for key in ("sigma_min", "sigma_max"):
        sigma = config[key]
        if sigma is not None and not (_is_number(sigma) and 0 < sigma <= sys.float_info.max):
            raise _wrong(key, sigma, "is null, or a number above 0")
    ranges = {
        "steps_offset": (0, length),
        "original_inference_steps": (1, length),
        "timestep_scaling": (0, sys.float_info.max),
    }
    for key, (low, high) in ranges.items():
        if not low <= config.get(key, low) <= high:
            raise _wrong(key, config[key], f"goes from {low} to {high:g}")


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _wrong(key: str, value: object, problem: str) -> ConfigError:
    hint = f"Correct scheduler_config.json: {key} {problem}."
    return ConfigError(f"the scheduler config's {key} is {shown(value)}", hint)


def _folded(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


_KNOWN = {_folded(key): key for key in SCHEDULERS}
_REASONS = {_folded(key): reason for key, reason in REFUSED.items()}
_REASONS["dpm++_sde"] = REFUSED["DPMSolverSDEScheduler"]
