"""Pictures: in their files, as requests over HTTP carry them, and beside those of diffusers."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sd_runtime.image import read_recipe_text
from sd_runtime.recipe import recipes_from_text

if TYPE_CHECKING:
    from pathlib import Path

    from sd_runtime import Pipeline, Recipe, Request
    from sd_runtime.result import Result


def png(picture: Image.Image) -> bytes:
    """The file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def text(picture: Image.Image) -> str:
    """The file in base64."""
    return base64.b64encode(png(picture)).decode()


def picture_of(text: str | None) -> Image.Image:
    """The picture of a file in base64."""
    assert text is not None
    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    picture.load()
    return picture


def pixels_of(path: Path) -> np.ndarray:
    """Those of the file."""
    with Image.open(path) as image:
        return np.asarray(image)


def recipe_in(path: Path) -> Recipe:
    """That of the file of one picture."""
    (recipe,), _ = recipes_from_text(read_recipe_text(path))
    return recipe


def assert_drawn_alike(pipeline: Pipeline, oracle: Any, request: Request, **inputs: Any) -> Result:
    """Draw ``request`` of seed 7, and ``inputs`` by diffusers' ``oracle``: the same picture."""
    import torch

    result = pipeline.generate(request)
    expected = oracle(
        num_inference_steps=request.num_inference_steps,
        generator=torch.Generator("cpu").manual_seed(7),
        **inputs,
    ).images[0]
    difference = np.abs(result.pixels[0].astype(int) - np.asarray(expected).astype(int))
    assert (difference <= 1).mean() >= 0.999
    return result
