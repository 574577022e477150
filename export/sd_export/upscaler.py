"""What upscalers' checkpoints have that others have not, as diffusers' pipelines correct it.

The x4 upscaler's UNet takes three channels of a picture's pixels, noised by a scheduler of its own,
and a class label that says how much. The x2 latent upscaler's predicts x₀ of latents. LDM3D's takes
latents of a picture and its depth, with no noise on them, and maybe such a label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_engines.errors import ConfigError, ExportError
from sd_export.family import is_latent_upscaler, is_ldm3d_upscaler, is_upscaler

if TYPE_CHECKING:
    from collections.abc import Mapping

LOW_RES_SCHEDULER = "low_res_scheduler"
"""Its folder in a checkpoint."""
_MAX_NOISE_LEVEL = 350
"""What diffusers' StableDiffusionUpscalePipeline allows where model_index.json is silent."""
_VAE_SCALING_FACTOR = 0.08333
"""What that pipeline puts in the place of any other that a VAE's config states, or leaves out."""


def upscaler_configs(configs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``configs`` of any checkpoint; those of an upscaler as its pipeline corrects them."""
    vae, scheduler = configs["vae"], configs["scheduler"]
    if is_upscaler(configs):
        vae = {**vae, "scaling_factor": _VAE_SCALING_FACTOR}
    if is_latent_upscaler(configs) and scheduler.get("prediction_type") == "original_sample":
        scheduler = {**scheduler, "prediction_type": "sample"}  # its other name
    return {**configs, "vae": vae, "scheduler": scheduler}


def max_noise_level(
    configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]
) -> int | None:
    """The most noise that an upscaler's UNet knows, by its model_index.json; None for others.

    diffusers puts none on a latent upscaler's; nor on what LDM3D's sees, whose UNet may be told of
    some all the same. `ExportError` where the scheduler for it does not go as far.
    """
    if not (is_upscaler(configs) or is_ldm3d_upscaler(configs)):
        return 0 if is_latent_upscaler(configs) else None
    labels = int(configs["unet"].get("num_class_embeds") or 1)
    most = min(int(index.get("max_noise_level", _MAX_NOISE_LEVEL)), labels - 1)
    if is_ldm3d_upscaler(configs):
        return most
    from sd_runtime.upscaling import low_res_level  # numpy, which sd-export --help does without

    try:
        low_res_level(configs[LOW_RES_SCHEDULER], most)
    except ConfigError as error:
        raise ExportError(
            error.message, error.hint, component=LOW_RES_SCHEDULER, stage="load"
        ) from error
    return most
