"""Tiny random ControlNets for a tiny checkpoint, made by the unmodified class of diffusers.

And what leads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from sd_runtime import Request
from tiny import seeded

if TYPE_CHECKING:
    from pathlib import Path


def make_controlnet(
    folder: Path, checkpoint: Path, *, seed: int, reads_prompt: bool = True, **config: Any
) -> Path:
    """Save a ControlNet of the UNet of ``checkpoint`` under ``folder`` and return ``folder``.

    A new one says nothing: the layers that are zero in it are random here. ``config`` changes what
    `ControlNetModel.from_unet` takes. Without ``reads_prompt`` it has no layer that looks at the
    prompt, as diffusers/controlnet-canny-sdxl-1.0-small.
    """
    import diffusers

    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    with seeded(seed):
        controlnet = diffusers.ControlNetModel.from_unet(
            unet, **{"conditioning_embedding_out_channels": (4, 8), **config}
        )
        if not reads_prompt:
            blocks = ["DownBlock2D"] * len(unet.config.down_block_types)
            small = {"down_block_types": blocks, "mid_block_type": "UNetMidBlock2D"}
            controlnet = diffusers.ControlNetModel.from_config({**controlnet.config, **small})
        silent = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
        for layer in [*silent, controlnet.controlnet_cond_embedding.conv_out]:
            torch.nn.init.normal_(layer.weight, std=0.2)
            torch.nn.init.normal_(layer.bias, std=0.2)
    controlnet.save_pretrained(folder)
    return folder


def control_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A random one, smooth."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def control_request(size: tuple[int, int], **options: Any) -> Request:
    """Two ControlNets, each with a picture of its own, where ``options`` do not say otherwise."""
    defaults = {"seed": 8, "num_inference_steps": 4, "guidance_scale": 3.0}
    pictures = {"control_image": [control_picture(seed, size) for seed in (0, 1)]}
    return Request(options.pop("prompt", "a cat"), **{**pictures, **defaults, **options})
