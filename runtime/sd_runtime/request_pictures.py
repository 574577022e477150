"""The pictures that a request may hold: read once, and told apart by what is in them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    from sd_runtime.depth_map import DepthMap
    from sd_runtime.input_image import InputImage
    from sd_runtime.request import Request

Taken: TypeAlias = "InputImage | DepthMap | tuple[InputImage, ...]"
PICTURES = ("image", "mask", "depth_map", "control_image")
"""Options of `Request`. A recipe names them by their digests, and does not hold them."""


def read_pictures(name: str, source: object) -> Taken | None:
    """What the option ``name``, one of `PICTURES`, takes of ``source``; None of None.

    A ``control_image`` is one picture, or a list of them. Raises `ConfigError` as `InputImage.of`
    and `DepthMap.of` do.
    """
    if source is None:
        return None
    if name == "depth_map":
        from sd_runtime.depth_map import DepthMap

        return DepthMap.of(source, name=name)
    from sd_runtime.input_image import InputImage  # and so numpy: not for --help

    if name != "control_image":
        return InputImage.of(source, name=name)
    pictures = list(source) if isinstance(source, list | tuple) else [source]
    if not pictures:
        raise ConfigError("control_image is an empty list", "Give a picture, or leave it out.")
    named = len(pictures) > 1
    return tuple(
        InputImage.of(picture, name=f"{name} {index}" if named else name)
        for index, picture in enumerate(pictures)
    )


def digest_of(taken: Taken | None) -> str | tuple[str, ...] | None:
    """Its SHA-256, as a recipe has it; of several a tuple."""
    if isinstance(taken, tuple):
        return tuple(picture.sha256 for picture in taken)
    return None if taken is None else taken.sha256


def fitted(request: Request, height: int, width: int) -> Request:
    """``request`` with its pictures resized to what is drawn, of which they draw the same bits.

    For tasks that draw at one size: neither upscalers nor variations.
    """
    controls = request.control_image and [c.fitted(height, width) for c in request.control_image]
    return replace(
        request,
        image=request.image and request.image.fitted(height, width),
        mask=request.mask and request.mask.fitted_mask(height, width),
        control_image=controls,
    )
