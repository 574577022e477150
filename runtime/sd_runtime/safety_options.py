"""What a request says to safety guidance: how strongly it is to lead away, and from what.

Schramowski et al. 2022 (arXiv:2211.05105), Safe Latent Diffusion; names and strengths are those of
diffusers' StableDiffusionPipelineSafe and its SafetyConfig.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sd_engines.errors import ConfigError, nearest
from sd_runtime.option_values import check_texts, shown
from sd_runtime.prompt_weighting import weighted_parts

if TYPE_CHECKING:
    from sd_runtime.request import Request

SAFETY_CONCEPT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, "
    "nudity, bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, "
    "weapons, child abuse, brutality, cruelty"
)
"""The paper's words (section 4), which CLIP cuts after 75 tokens as it does all others."""


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """One strength: what the equations of `sd_runtime.guidance` are told."""

    sld_guidance_scale: float
    sld_warmup_steps: int
    sld_threshold: float
    sld_momentum_scale: float
    sld_mom_beta: float


SAFETY_STRENGTHS = {
    "weak": SafetyConfig(
        sld_guidance_scale=20,
        sld_warmup_steps=15,
        sld_threshold=0.0,
        sld_momentum_scale=0.0,
        sld_mom_beta=0.0,
    ),
    "medium": SafetyConfig(
        sld_guidance_scale=1000,
        sld_warmup_steps=10,
        sld_threshold=0.01,
        sld_momentum_scale=0.3,
        sld_mom_beta=0.4,
    ),
    "strong": SafetyConfig(
        sld_guidance_scale=2000,
        sld_warmup_steps=7,
        sld_threshold=0.025,
        sld_momentum_scale=0.5,
        sld_mom_beta=0.7,
    ),
    "max": SafetyConfig(
        sld_guidance_scale=5000,
        sld_warmup_steps=0,
        sld_threshold=1.0,
        sld_momentum_scale=0.5,
        sld_mom_beta=0.7,
    ),
}
"""By what `Request.safety_guidance` names, in their order."""


def check_safety_options(request: Request) -> None:
    """`ConfigError` for a strength that is none, a concept that is no text or has no strength."""
    strength, concept = request.safety_guidance, request.safety_concept
    if strength is not None and not (isinstance(strength, str) and strength in SAFETY_STRENGTHS):
        raise ConfigError(
            f"safety_guidance is {shown(strength)}", nearest(str(strength), SAFETY_STRENGTHS)
        )
    if concept is None:
        return
    if strength is None:
        raise ConfigError(
            "a safety_concept without safety_guidance",
            f"Say how strongly: --safety-guidance {'|'.join(SAFETY_STRENGTHS)}.",
        )
    if not isinstance(concept, str) or not concept.strip():
        raise ConfigError(
            f"safety_concept is {shown(concept)}", "Name what to lead away from, or leave it out."
        )
    check_texts("safety_concept", concept)
    if request.prompt_weighting:
        weighted_parts(concept)


def check_safety_guidance(request: Request, *, is_guided: bool) -> None:
    """`ConfigError` where safety guidance does not go with what else ``request`` asks for.

    ``is_guided``: the UNet is run beside a negative prompt too.
    """
    if not is_guided:
        raise ConfigError(
            "safety_guidance without guidance: it corrects what that does",
            "Take a guidance_scale above 1, of a model that was not distilled; or leave it out.",
        )
    others = {
        "image": request.image is not None,
        "control_image": request.control_image is not None,
        "cache_interval": request.cache_interval != 1,
        "guidance_start": request.guidance_start != 0,
        "guidance_stop": request.guidance_stop != 1,
        "high_noise_frac": request.high_noise_frac is not None,
    }
    for name, given in others.items():
        if given:
            raise ConfigError(
                f"safety_guidance and {name} do not go together: it is for pictures from text "
                "alone, and holds for every step",
                f"Leave {name} out, or safety_guidance.",
            )
