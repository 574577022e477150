"""What a distilled UNet is told of its guidance, against diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from sd_runtime.conditioning import guidance_scale_embedding


@pytest.mark.parametrize("guidance_scale", [8.5, 1.0, -3.0, 100.0])
@pytest.mark.parametrize("width", [256, 32, 17])
def test_guidance_embedding_is_that_of_diffusers(guidance_scale: float, width: int) -> None:
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    scales = torch.tensor(guidance_scale - 1).repeat(1)
    expected = embed(None, scales, embedding_dim=width)[0].numpy()  # type: ignore[arg-type]
    found = guidance_scale_embedding(guidance_scale, width)
    assert found.dtype == np.float32
    # the last bit of torch's exponentials, times angles up to 1000·|guidance_scale − 1|
    tolerance = 2**-23 * 1000 * max(1, abs(guidance_scale - 1))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
