"""CLIP's image encoder as a torch module to trace, with the normalisation of its pictures inside.

Pictures come in its own size: they are of any, and are resized before, by `sd_runtime`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sd_engines.errors import ExportError
from sd_export.image_processor import CLIP_SIZE, clip_image_processor, height_width

if TYPE_CHECKING:
    from collections.abc import Mapping

_BICUBIC = 3


class ImageEncoder(nn.Module):
    """images [batch, s, s, 3] in [0, 1] → image_embeds [batch, 1, d], as the UNet reads them."""

    def __init__(self, encoder: nn.Module, *, processor: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder: Any = encoder
        size = picture_size(processor)
        self.processor = clip_image_processor(processor, height=size, width=size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode."""
        image_embeds: torch.Tensor = self.encoder(self.processor(images)).image_embeds
        return image_embeds[:, None]


def picture_size(processor: Mapping[str, Any]) -> int:
    """The side of the squares that CLIP's image processor of this config makes, in pixels.

    `ExportError` where it does not make them of a picture's middle, by the bicubic filter: the
    runtime does.
    """
    size = processor.get("size", CLIP_SIZE)
    edge = size if isinstance(size, int) else size.get("shortest_edge")
    cropped = height_width(processor.get("crop_size", CLIP_SIZE))
    if cropped != (edge, edge) or processor.get("resample", _BICUBIC) != _BICUBIC:
        raise ExportError(
            f"pictures are not resized to {edge} by the bicubic filter and cropped to their middle "
            f"square, but to {cropped[0]}×{cropped[1]} by filter {processor.get('resample')}",
            "Use another checkpoint: those of CLIP are.",
            component="feature_extractor",
            stage="load",
        )
    return cropped[0]
