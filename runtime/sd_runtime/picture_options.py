"""What a request says of the picture it starts from, and may not say where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_engines.errors import ConfigError
from sd_runtime.option_values import check_real, check_whole

if TYPE_CHECKING:
    from sd_runtime.request import Request


def check_picture_options(request: Request) -> None:
    """`ConfigError` for a mask of another size, a number out of range, or any without a picture."""
    for name, what in (("mask", "a mask"), ("depth_map", "a depth map")):
        if request.image is None and getattr(request, name) is not None:
            raise ConfigError(f"{what} without a picture", "Give the picture too: --image PICTURE.")
    if request.mask is not None and request.mask.image.size != request.image.image.size:
        (image_width, image_height), (width, height) = (
            request.image.image.size,
            request.mask.image.size,
        )
        raise ConfigError(
            f"the mask is {height}×{width} (height × width), its picture "
            f"{image_height}×{image_width}",
            "Give a mask that was made for the picture, of the same size.",
        )
    if request.strength is not None:
        check_real("strength", request.strength, 0.0, 1.0)
        if request.image is None:
            raise ConfigError(
                f"strength is {request.strength:g} without a picture to start from",
                "Give one: --image PICTURE; or leave strength out.",
            )
    if request.noise_level is not None:
        check_whole("noise_level", request.noise_level, 0)
        if request.image is None:
            raise ConfigError(
                f"noise_level is {request.noise_level} without a picture to make larger",
                "Give one: --image PICTURE; or leave noise_level out.",
            )
