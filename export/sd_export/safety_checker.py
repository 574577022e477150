"""The safety checker as a torch module to trace, with its own resizing inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sd_export.image_processor import clip_image_processor

if TYPE_CHECKING:
    from collections.abc import Mapping


class SafetyChecker(nn.Module):
    """images [batch, H, W, 3] in [0, 1] → nsfw_content_detected bool [batch]."""

    def __init__(
        self, checker: nn.Module, *, processor: Mapping[str, Any], height: int, width: int
    ) -> None:
        super().__init__()
        self.checker: Any = checker
        self.processor = clip_image_processor(processor, height=height, width=width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Check."""
        pixels = self.processor(images)
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
