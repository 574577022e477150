"""What transformers' image processors do to a picture, as a torch module to trace.

Models that see pictures were trained on what Pillow made of them: so does this, to the last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

CLIP_SIZE = 224
"""What CLIP's image processor takes where its config is silent."""
_PILLOW_ONE = 2**22
"""What a weight of 1 is to Pillow, which resizes 8-bit pictures by whole numbers."""
_PART = 2**11
"""Each weight is ``_PART`` · high + low: sums of either's products with 8 bits are exact in
float32, as long as no pixel is made of more than 32."""


class ImageProcessor(nn.Module):
    """images [batch, H, W, 3] in [0, 1] → pixel_values [batch, 3, h, w], normalised.

    ``config`` is the processor's own; pictures of ``size`` are brought to ``resized`` and the
    middle ``cropped`` of that is kept, all (height, width).
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        size: tuple[int, int],
        resized: tuple[int, int],
        cropped: tuple[int, int],
    ) -> None:
        super().__init__()
        resample = int(config.get("resample", Image.Resampling.BICUBIC))
        rows, columns = (
            _resize_weights(size[axis], resized[axis], cropped[axis], resample) for axis in (0, 1)
        )
        self.rows: torch.Tensor
        self.columns: torch.Tensor
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns.mT.contiguous())
        self.register_buffer("mean", torch.tensor(config["image_mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(config["image_std"])[:, None, None])
        self._columns_first = self._resizes_columns_first(size, resized, resample)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Prepare."""
        pixels = torch.floor(images.permute(0, 3, 1, 2) * 255 + 0.5).clamp(0, 255)
        pixels = self._resize(pixels, columns_first=self._columns_first)
        return (pixels / 255 - self.mean) / self.std

    def _resize(self, pixels: torch.Tensor, *, columns_first: bool) -> torch.Tensor:
        """[…, H, W] to [… , h, w] in two passes, each rounded to 8 bits."""
        for in_columns in (columns_first, not columns_first):
            if in_columns:
                pixels = _to_8_bits(self.rows[0] @ pixels, self.rows[1] @ pixels)
            else:
                pixels = _to_8_bits(pixels @ self.columns[0], pixels @ self.columns[1])
        return pixels

    def _resizes_columns_first(
        self, size: tuple[int, int], resized: tuple[int, int], resample: int
    ) -> bool:
        """Whether Pillow does, as it does since version 13 where that is less work: it is asked."""
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        whole = Image.fromarray(noise).resize(resized[::-1], Image.Resampling(resample))
        height, width = self.rows.shape[1], self.columns.shape[2]
        top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
        wanted = np.asarray(whole)[top : top + height, left : left + width]
        pixels = torch.from_numpy(noise.astype(np.float32)).permute(2, 0, 1)
        unlike = [
            np.sum(self._resize(pixels, columns_first=first).permute(1, 2, 0).numpy() != wanted)
            for first in (False, True)
        ]
        return bool(unlike[1] < unlike[0])


def clip_image_processor(
    processor: Mapping[str, Any], *, height: int, width: int
) -> ImageProcessor:
    """What CLIP's image processor of the config ``processor`` does to pictures of one size."""
    return ImageProcessor(
        processor,
        size=(height, width),
        resized=_resized(height, width, processor.get("size", CLIP_SIZE)),
        cropped=height_width(processor.get("crop_size", CLIP_SIZE)),
    )


def _resized(height: int, width: int, size: int | Mapping[str, int]) -> tuple[int, int]:
    """The size before the crop, as transformers computes it: the shortest edge, the aspect kept."""
    if not isinstance(size, int) and "height" in size:
        return height_width(size)
    edge = size if isinstance(size, int) else size["shortest_edge"]
    if height <= width:
        return edge, int(edge * width / height)
    return int(edge * height / width), edge


def height_width(size: int | Mapping[str, int]) -> tuple[int, int]:
    """A size in a processor's config: one number for both sides, or two by their names."""
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def _to_8_bits(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Sums of pixels times the two parts of their weights, rounded as Pillow rounds them."""
    half = _PILLOW_ONE // _PART // 2
    return torch.floor((high + torch.floor(low / _PART) + half) / (2 * half)).clamp(0, 255)


def _resize_weights(size: int, resized: int, crop: int, resample: int) -> torch.Tensor:
    """Pillow's weights from ``size`` pixels of one axis to the middle ``crop`` of ``resized``.

    float32 [2, crop, size], the high parts and the low ones; a resize of the identity reads them
    off.
    """
    identity = Image.fromarray(np.eye(size, dtype=np.int32) * np.int32(_PILLOW_ONE))
    weights = np.array(identity.resize((size, resized), resample=Image.Resampling(resample)))
    top = (resized - crop) // 2
    weights = weights[top : top + crop].astype(np.int64)
    high = (weights + _PART // 2) // _PART
    return torch.from_numpy(np.stack([high, weights - high * _PART]).astype(np.float32))
