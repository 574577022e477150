"""The noise stream against torch's CPU generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sd_engines.errors import ConfigError
from sd_runtime.noise import MAX_SEED, NoiseStream

SEEDS = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63, 2**64 - 2, MAX_SEED]
DRAWS = {
    "a latent": [(4, 64, 64)],
    "latents, one by one": [(1, 4, 16, 16)] * 3,
    "below a block": [(), (3,), (15,), (1,), (2, 2)],
    "not whole blocks": [(17,), (31,), (5, 7), (16,), (1001,)],
    "a kept second normal": [(1,), (4, 8), (1,), (3,), (20,), (2,)],
    "nothing": [(0,), (5,), (0, 4), (16,)],
}


@pytest.mark.parametrize("shapes", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("seed", SEEDS)
def test_stream_equals_torch(seed: int, shapes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    stream = NoiseStream(seed)
    for shape in shapes:
        expected = torch.randn(shape, generator=generator).numpy()
        drawn = stream.normal(shape)
        assert drawn.shape == expected.shape
        assert drawn.dtype == np.float32
        np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-6)


def test_tails() -> None:
    expected = torch.randn(3_000_000, generator=torch.Generator("cpu").manual_seed(3)).numpy()
    assert np.abs(expected).max() > 4.9
    drawn = NoiseStream(3).normal(expected.shape)
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ConfigError, match=str(seed)):
        NoiseStream(seed)
