"""What a checkpoint's UNet is for, told from the configs of its models."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from sd_export.family import (
    is_latent_upscaler,
    is_ldm3d_upscaler,
    is_refiner,
    is_upscaler,
    latent_channels,
    painted_channels,
    text_encoders,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


class Kind(Enum):
    """What a picture is drawn from or for, by the word in the name of diffusers' pipeline."""

    TEXT = ""
    INPAINTING = "Inpaint"
    """Its UNet sees the mask and the masked picture's latents beside the latents."""
    DEPTH = "Depth2Img"
    """Its UNet sees a picture's depth beside the latents."""
    VARIATIONS = "ImageVariation"
    """Its UNet reads a picture in the place of a prompt."""
    REFINER = "Img2Img"
    """Its UNet goes on with latents of Stable Diffusion XL."""
    X4_UPSCALER = "Upscale"
    """Its UNet sees a small picture beside the latents."""
    X2_UPSCALER = "LatentUpscale"
    """Its UNet sees a small picture's latents beside the latents."""
    LDM3D = "LDM3D"
    """Its VAE paints depth beside the picture."""
    LDM3D_UPSCALER = "UpscaleLDM3D"
    """Its UNet sees the latents of a picture and its depth beside the latents."""


UPSCALERS = (Kind.X4_UPSCALER, Kind.X2_UPSCALER, Kind.LDM3D_UPSCALER)


def kind_of(configs: Mapping[str, Mapping[str, Any]]) -> Kind:
    """The kind of the checkpoint whose models have ``configs``, in diffusers' words."""
    latents = latent_channels(configs["vae"])
    seen = int(configs["unet"].get("in_channels", 4))
    if is_latent_upscaler(configs):
        return Kind.X2_UPSCALER
    if is_upscaler(configs):
        return Kind.X4_UPSCALER
    if is_ldm3d_upscaler(configs):
        return Kind.LDM3D_UPSCALER
    if seen == 2 * latents + 1:
        return Kind.INPAINTING
    if seen == latents + 1:
        return Kind.DEPTH
    if not text_encoders(configs):
        return Kind.VARIATIONS
    if is_refiner(configs):
        return Kind.REFINER
    return Kind.LDM3D if painted_channels(configs) > 3 else Kind.TEXT
