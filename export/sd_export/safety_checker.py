"""The safety checker as a torch module to trace, with its own resizing inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping


class SafetyChecker(nn.Module):
    """images [batch, H, W, 3] in [0, 1] → nsfw_content_detected bool [batch].

    Pictures are resized as Pillow does it, which is what the checker was made with: to 8 bits, one
    pass over each axis with its bicubic weights, 8 bits again after each.
    """

    def __init__(
        self, checker: nn.Module, *, processor: Mapping[str, Any], height: int, width: int
    ) -> None:
        super().__init__()
        self.checker: Any = checker
        crop = _height_width(processor["crop_size"])
        resized = _resized(height, width, processor["size"])
        resample = int(processor.get("resample", 3))
        self.rows: torch.Tensor
        self.columns: torch.Tensor
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("rows", _resize_weights(height, resized[0], crop[0], resample))
        self.register_buffer("columns", _resize_weights(width, resized[1], crop[1], resample).T)
        self.register_buffer("mean", torch.tensor(processor["image_mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(processor["image_std"])[:, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Check."""
        pixels = _to_8_bits(images.permute(0, 3, 1, 2) * 255)
        pixels = _to_8_bits(pixels @ self.columns)
        pixels = _to_8_bits(self.rows @ pixels)
        pixels = (pixels / 255 - self.mean) / self.std
        checker = self.checker
        embeds = checker.visual_projection(checker.vision_model(pixels)[1])  # [batch, d]
        special = _cosine(embeds, checker.special_care_embeds)  # [batch, 3]
        concepts = _cosine(embeds, checker.concept_embeds)  # [batch, 17]
        # diffusers rounds scores to three digits; one special hit lowers every threshold by 0.01
        special_hit = _over(special, checker.special_care_embeds_weights).any(dim=1, keepdim=True)
        adjusted = concepts + 0.01 * special_hit.to(concepts.dtype)
        return _over(adjusted, checker.concept_embeds_weights).any(dim=1)


def _cosine(embeds: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    normalize = nn.functional.normalize
    return normalize(embeds) @ normalize(concepts).T


def _over(cosines: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    return torch.round((cosines - thresholds) * 1000) > 0


def _to_8_bits(pixels: torch.Tensor) -> torch.Tensor:
    return torch.floor(pixels + 0.5).clamp(0, 255)


def _height_width(size: int | Mapping[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def _resized(height: int, width: int, size: int | Mapping[str, int]) -> tuple[int, int]:
    """The size before the crop, as transformers computes it: the shortest edge, the aspect kept."""
    if not isinstance(size, int) and "height" in size:
        return _height_width(size)
    edge = size if isinstance(size, int) else size["shortest_edge"]
    if height <= width:
        return edge, int(edge * width / height)
    return int(edge * height / width), edge


def _resize_weights(size: int, resized: int, crop: int, resample: int) -> torch.Tensor:
    """Pillow's weights from ``size`` pixels of one axis to the middle ``crop`` of ``resized``.

    float32 [crop, size]; a resize of the identity reads them off.
    """
    identity = Image.fromarray(np.eye(size, dtype=np.float32))
    weights = identity.resize((size, resized), resample=Image.Resampling(resample))
    top = (resized - crop) // 2
    return torch.from_numpy(np.array(weights)[top : top + crop])
