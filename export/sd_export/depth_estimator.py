"""The depth estimator as a torch module to trace, with all that its pipeline does around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sd_export.image_processor import ImageProcessor, height_width

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sd_engines.spec import Profile


class DepthEstimator(nn.Module):
    """images [batch, H, W, 3] in [0, 1] → depth_mask [batch, 1, h, w], as the UNet takes it.

    From −1, what is farthest in a picture, to 1, what is nearest; not finite where all is equally
    near. Ranftl et al. 2021 (arXiv:2103.13413).
    """

    def __init__(
        self, estimator: nn.Module, *, processor: Mapping[str, Any], profile: Profile
    ) -> None:
        super().__init__()
        self.estimator: Any = estimator
        size = (profile.height, profile.width)
        resized = _resized(size, processor)
        self.processor = ImageProcessor(processor, size=size, resized=resized, cropped=resized)
        self.latent_size = (profile.latent_height, profile.latent_width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Estimate."""
        depth = self.estimator(self.processor(images)).predicted_depth[:, None]
        depth = nn.functional.interpolate(depth, size=self.latent_size, mode="bicubic")
        low = torch.amin(depth, dim=(1, 2, 3), keepdim=True)
        high = torch.amax(depth, dim=(1, 2, 3), keepdim=True)
        return 2 * (depth - low) / (high - low) - 1


def _resized(size: tuple[int, int], processor: Mapping[str, Any]) -> tuple[int, int]:
    """What DPT's image processor brings pictures to, as transformers computes it."""
    wanted = height_width(processor.get("size", 384))
    scales = [side / given for side, given in zip(wanted, size, strict=True)]
    if processor.get("keep_aspect_ratio"):  # that of the side which changes less
        scales = [min(reversed(scales), key=lambda scale: abs(1 - scale))] * 2
    multiple = processor.get("ensure_multiple_of") or 1
    height, width = (
        round(scale * given / multiple) * multiple
        for scale, given in zip(scales, size, strict=True)
    )
    return height, width
