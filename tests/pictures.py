"""Pictures: as requests over HTTP carry them, and beside those that diffusers draws."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from sd_runtime import Pipeline, Request
    from sd_runtime.result import Result


def png(picture: Image.Image) -> bytes:
    """The file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def text(picture: Image.Image) -> str:
    """The file in base64."""
    return base64.b64encode(png(picture)).decode()


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
