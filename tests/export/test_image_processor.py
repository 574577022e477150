"""Pictures as models see them: what the graphs do, against Pillow and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from sd_export.image_processor import ImageProcessor, clip_image_processor

PLAIN = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def pictures(height: int, width: int) -> np.ndarray:
    """Two of noise, which shows every rounding, uint8 [2, H, W, 3]."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize(
    ("size", "resized"),  # the second is so tall that Pillow 13 takes its columns first
    [((64, 48), (48, 48)), ((512, 64), (384, 33)), ((24, 24), (36, 16)), ((16, 16), (16, 16))],
)
def test_resizing_is_pillows_to_the_last_bit(
    size: tuple[int, int], resized: tuple[int, int], resample: Image.Resampling
) -> None:
    config = {**PLAIN, "resample": int(resample)}
    processor = ImageProcessor(config, size=size, resized=resized, cropped=resized)
    given = pictures(*size)
    found = processor(torch.from_numpy(given.astype(np.float32) / 255)).permute(0, 2, 3, 1) * 255
    wanted = [Image.fromarray(picture).resize(resized[::-1], resample) for picture in given]
    np.testing.assert_array_equal(found.round().numpy(), np.stack([*map(np.asarray, wanted)]))


@pytest.mark.parametrize("size", [28, {"shortest_edge": 28}, {"height": 30, "width": 28}])
def test_clips_processor(size: int | dict[str, int]) -> None:
    config = {
        "size": size,
        "crop_size": 26 if isinstance(size, int) else {"height": 26, "width": 24},
        "resample": 3,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    given = pictures(40, 64)
    processor = clip_image_processor(config, height=40, width=64)
    found = processor(torch.from_numpy(given.astype(np.float32) / 255))
    wanted = CLIPImageProcessorPil(**config)(list(given), return_tensors="pt").pixel_values
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
