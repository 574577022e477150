"""Pictures that are wider than high, against diffusers' own pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from sd_runtime import Request

if TYPE_CHECKING:
    from conftest import TinyModel

# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

ROWS, COLUMNS = np.mgrid[:16, :40]
PICTURE = np.stack([ROWS * 12, COLUMNS * 5, 255 - ROWS * 7], axis=-1).astype(np.uint8)
MASK = ((ROWS + COLUMNS > 30) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    "request_",
    [
        Request(("a red circle", "a cat", "a dog"), seed=7, num_inference_steps=3),
        Request("a cat", seed=5, num_inference_steps=4, image=PICTURE, strength=0.6),
        Request("a cat", seed=5, num_inference_steps=3, image=PICTURE, mask=MASK, guidance_scale=5),
    ],
    ids=["text", "image", "mask"],
)
def test_wide_pictures_are_those_of_diffusers(wide_model: TinyModel, request_: Request) -> None:
    profile = wide_model.pipeline.profile
    assert (profile.height, profile.width) == (16, 40)
    wide_model.assert_same(request_)
