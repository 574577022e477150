"""A VAE of diffusers by the tiles of `sd_runtime`: what a bundle of tiles is compared with.

diffusers' own tiles are smaller at the right and the bottom, and engines have one shape.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sd_export.family import vae_scale_factor
from sd_runtime.tiles import Tiling

if TYPE_CHECKING:
    from collections.abc import Callable


def work_in_tiles(vae: Any, tile_height: int, tile_width: int) -> None:
    """Make ``vae``, an AutoencoderKL, see ``tile_height``×``tile_width`` latents at once."""
    factor = vae_scale_factor(vae.config.block_out_channels)
    encode, decode = vae._encode, vae._decode

    def pixels(part: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = decode(part, return_dict=False)[0]
        return images.clamp(-1, 1)  # as graphs give them, before they are mixed

    def decode_tiles(latents: torch.Tensor, return_dict: bool = True) -> Any:
        height, width = latents.shape[2:]
        tiling = Tiling(height, width, tile_height, tile_width)
        images = _joined(pixels, latents, tiling, 1)
        return SimpleNamespace(sample=images) if return_dict else (images,)

    def encode_tiles(images: torch.Tensor) -> torch.Tensor:
        height, width = (side // factor for side in images.shape[2:])
        tiling = Tiling(height, width, tile_height, tile_width)

        def moments(part: torch.Tensor) -> torch.Tensor:
            mean, log_variance = encode(part).chunk(2, dim=1)
            return torch.cat([mean, torch.exp(log_variance.clamp(-30, 20) / 2)], dim=1)

        mean, std = _joined(moments, images, tiling, factor).chunk(2, dim=1)
        return torch.cat([mean, 2 * torch.log(std)], dim=1)

    vae._decode, vae._encode = decode_tiles, encode_tiles


def _joined(
    work: Callable[[torch.Tensor], torch.Tensor], whole: torch.Tensor, tiling: Tiling, scale: int
) -> torch.Tensor:
    """What ``work`` makes of the tiles of ``whole`` [b, c, h, w], ``scale`` pixels a latent."""
    high, wide = scale * tiling.tile_height, scale * tiling.tile_width
    parts = [
        work(whole[:, :, top : top + high, left : left + wide])
        for top, left in (scale * np.array(tiling.tiles)).tolist()
    ]
    channels_last = torch.stack(parts, dim=1).permute(0, 1, 3, 4, 2).numpy()
    joined = np.stack([tiling.join(tiles) for tiles in channels_last])
    return torch.from_numpy(joined).permute(0, 3, 1, 2).contiguous()
