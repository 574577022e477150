"""Two models for one picture: the base draws the rough of it, its refiner the rest.

Podell et al. 2023 (arXiv:2307.01952), section 2.5; an "ensemble of expert denoisers" after Balaji
et al. 2022 (arXiv:2211.01324). Latents go from one to the other as they are, and are not decoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    from sd_engines.manifest import Manifest
    from sd_runtime.request import Request

HIGH_NOISE_FRAC = 0.8
"""The share of the steps that the base draws where nobody says otherwise, as diffusers advises."""


def sized_refiner(request: Request, base: Manifest, refiner: Manifest) -> Manifest:
    """``refiner`` at the size of ``base``, to go on with what that draws of ``request``.

    `ConfigError` where it cannot.
    """
    if not refiner.model.requires_aesthetics_score:
        raise ConfigError(
            f"{refiner.model.source} is no refiner",
            "Give the bundle of one: sd-export --model "
            "stabilityai/stable-diffusion-xl-refiner-1.0 --output BUNDLE.",
        )
    if request.image is not None:
        raise ConfigError(
            "a refiner goes on with pictures that begin as noise",
            "Leave --image or --refiner out; the refiner's bundle alone draws from --image.",
        )
    if (request.guidance_start, request.guidance_stop) != (0, 1):
        raise ConfigError(
            "guidance holds for every step where two models share them",
            "Leave guidance_start and guidance_stop out, or the refiner.",
        )
    if request.cache_interval != 1:
        raise ConfigError(
            "a base model and its refiner cache no features", "Leave cache_interval out."
        )
    if request.safety_guidance is not None:
        raise ConfigError(
            "safety guidance holds for every step, and a refiner's are another model's",
            "Leave safety_guidance out, or the refiner.",
        )
    refiner = at_size_of(base, refiner)
    ours, theirs = base.profile, refiner.profile
    if (ours.height, ours.width, ours.vae_scale_factor, base.model.latent_channels) != (
        theirs.height,
        theirs.width,
        theirs.vae_scale_factor,
        refiner.model.latent_channels,
    ):
        raise ConfigError(
            f"the bundle draws {ours.height}×{ours.width} (height × width), its refiner "
            f"{theirs.height}×{theirs.width}",
            f"Export the refiner anew: sd-export --model {refiner.model.source} "
            f"--height {ours.height} --width {ours.width} --output BUNDLE.",
        )
    if theirs.batch_size < min(ours.batch_size, request.num_images):
        raise ConfigError(
            f"the bundle draws {ours.batch_size} pictures at once, its refiner {theirs.batch_size}",
            f"Export the refiner anew: sd-export --model {refiner.model.source} "
            f"--batch-size {ours.batch_size} --output BUNDLE.",
        )
    return refiner


def at_size_of(base: Manifest, refiner: Manifest) -> Manifest:
    """``refiner`` at the size of ``base``, as it is where it has not that size."""
    size = base.profile.height, base.profile.width
    sizes = [(each.profile.height, each.profile.width) for each in refiner.sizes]
    return refiner.at(*size) if size in sizes else refiner
