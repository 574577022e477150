"""What an upscaler's checkpoint has that others have not.

Of a picture's pixels and no latents its UNet takes three channels, noised by a scheduler of its
own, and a class label that says how much (Stable Diffusion 2's x4 upscaler).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_engines.errors import ConfigError, ExportError
from sd_export.family import is_upscaler
from sd_runtime.upscaling import low_res_level

if TYPE_CHECKING:
    from collections.abc import Mapping

LOW_RES_SCHEDULER = "low_res_scheduler"
"""Its folder in a checkpoint."""
_MAX_NOISE_LEVEL = 350
"""What diffusers' StableDiffusionUpscalePipeline allows where model_index.json is silent."""
_VAE_SCALING_FACTOR = 0.08333
"""What that pipeline puts in the place of any other that a VAE's config states, or leaves out."""


def upscaler_configs(
    configs: Mapping[str, dict[str, Any]], low_res_scheduler: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """``configs`` of an upscaler's folder as diffusers' pipeline corrects them."""
    vae = {**configs["vae"], "scaling_factor": _VAE_SCALING_FACTOR}
    return {**configs, "vae": vae, LOW_RES_SCHEDULER: low_res_scheduler}


def max_noise_level(
    configs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]
) -> int | None:
    """The most noise that an upscaler's UNet knows, by its model_index.json; None for others.

    `ExportError` where its own scheduler does not go as far.
    """
    if not is_upscaler(configs):
        return None
    labels = int(configs["unet"]["num_class_embeds"])
    most = min(int(index.get("max_noise_level", _MAX_NOISE_LEVEL)), labels - 1)
    try:
        low_res_level(configs[LOW_RES_SCHEDULER], most)
    except ConfigError as error:
        raise ExportError(
            error.message, error.hint, component=LOW_RES_SCHEDULER, stage="load"
        ) from error
    return most
