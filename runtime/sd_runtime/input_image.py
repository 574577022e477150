"""Pictures that a request starts from: read, checked, and brought to the size of a bundle.

What diffusers' ``load_image`` and ``VaeImageProcessor`` make of them, to the last bit; what those
would guess about (see-through parts, the frame of an animation) is refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sd_engines.errors import ConfigError, plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_NO_RANGE = ("I", "F")
"""Pillow's modes of whole or real numbers that do not say what is black and what is white."""
_NEAREST = ("1", "P")
"""Pillow's modes that it resizes by the nearest pixel, so that a mask of one is not one in RGB."""
_STRIP = 256
"""Rows of a picture that are hashed at once."""


@dataclass(frozen=True)
class InputImage:
    """A picture or a mask as it was given, upright, with no see-through part.

    ``sha256`` is of all that decides what is drawn from it: its size and its RGB pixels, so that
    the same picture in another file is equal. ``name`` is for people.
    """

    sha256: str
    name: str = field(compare=False)
    image: Image = field(compare=False, repr=False)

    @classmethod
    def of(cls, source: object, *, name: str) -> Self:
        """From a path, a Pillow picture, or uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].

        ``name`` is what to call a picture that has no path. Raises `ConfigError` for what is no
        picture, cannot be read, is animated or see-through, or whose values have no known range.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, str | os.PathLike):
            name = os.fspath(source)
        with readable(name):
            image = opaque(_of_8_bits(opened_image(source, name), name), name)
            return cls(_digest(image), name, image)

    def fitted(self, height: int, width: int) -> Self:
        """The same for `pixels` of this size and no other; of a large one far less memory."""
        self._warn_of_stretching(height, width)
        return replace(self, image=_resized(self.image.convert("RGB"), height, width))

    def fitted_mask(self, height: int, width: int) -> Self:
        """The same for `mask`."""
        self._warn_of_stretching(height, width)
        return replace(self, image=_resized(self.image, height, width))

    def pixels(self, height: int, width: int) -> NDArray[np.uint8]:
        """uint8 [height, width, 3]; another size is resized by Lanczos' filter, as diffusers does.

        Its proportions are not kept: it is stretched, with a warning.
        """
        return np.asarray(self.fitted(height, width).image)

    def middle_square(self, size: int) -> NDArray[np.uint8]:
        """uint8 [size, size, 3]: its shorter side resized to ``size``, and the middle of that.

        By the bicubic filter, as transformers' image processor of CLIP does.
        """
        from PIL.Image import Resampling

        rgb = self.image.convert("RGB")
        shorter = min(rgb.size)
        width, height = (int(size * side / shorter) for side in rgb.size)
        pixels = np.asarray(rgb.resize((width, height), Resampling.BICUBIC))
        top, left = (height - size) // 2, (width - size) // 2
        return pixels[top : top + size, left : left + size]

    def mask(self, height: int, width: int) -> NDArray[np.bool_]:
        """Where it is 0.5 or brighter, bool [height, width]; resized as `pixels`."""
        return np.asarray(self.fitted_mask(height, width).image.convert("L")) >= 128

    def _warn_of_stretching(self, height: int, width: int) -> None:
        given = self.image
        # Neither side off by more than the pixel that rounding costs.
        if abs(given.width * height - given.height * width) > max(
            given.width, given.height, height, width
        ):
            logger.warning(
                "%s is %d×%d (height × width) and is stretched to %d×%d: crop it to keep its "
                "proportions",
                self.name,
                given.height,
                given.width,
                height,
                width,
            )


def _resized(image: Image, height: int, width: int) -> Image:
    from PIL.Image import Resampling

    return image.resize((width, height), Resampling.LANCZOS)


def _digest(image: Image) -> str:
    """By strips: all pixels of a large picture once more would be much memory."""
    resized_as = image.mode if image.mode in _NEAREST else "RGB"
    digest = hashlib.sha256(f"{resized_as} {image.width}x{image.height}\n".encode())
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        digest.update(strip.convert("RGB").tobytes())
    return digest.hexdigest()


@contextmanager
def readable(name: str) -> Iterator[None]:
    """`ConfigError` that names the file, for what Pillow and numpy raise of one that is broken."""
    from PIL import Image

    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ConfigError(f"{name}: {error}", "Make it smaller first.") from error
    except Exception as error:  # of a broken file their decoders raise whatever they come upon
        raise ConfigError(
            f"cannot read the picture {name}: {plain(error)}",
            "Name a picture file, such as a .png, .jpg or .webp.",
        ) from error


def opened_image(source: object, name: str) -> Image:
    """A picture in whatever mode, upright; `ConfigError` for what is none or has several frames.

    What Pillow raises where it is broken is for `readable`.
    """
    from PIL import Image, ImageOps

    if isinstance(source, str | os.PathLike):
        with Image.open(source) as opened:
            _check_one_frame(opened, name)
            image = ImageOps.exif_transpose(opened)
    elif isinstance(source, Image.Image):
        _check_one_frame(source, name)
        image = ImageOps.exif_transpose(source)
    else:
        image = Image.fromarray(_checked_array(source, name).copy())  # it may change later
    if not image.width * image.height:
        raise ConfigError(f"{name} is {image.width}×{image.height}", "Give one with pixels.")
    return image


def _check_one_frame(image: Image, name: str) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG: the others are previews
        raise ConfigError(
            f"{name} has {frames} frames", "Save the one that you mean as a picture of its own."
        )


def _checked_array(source: object, name: str) -> NDArray[np.uint8]:
    array: Any = source if isinstance(source, np.ndarray) else np.empty(0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        given = f"shape {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
        raise ConfigError(
            f"{name} is no picture but {given}",
            "Give a path, a Pillow picture, or uint8 of shape (height, width, 3).",
        )
    if array.dtype != np.uint8:
        raise ConfigError(
            f"{name} is an array of {array.dtype}",
            "Give uint8, 0 to 255: array.astype('uint8') of such numbers, "
            "(255 * array).astype('uint8') of those from 0 to 1.",
        )
    checked: NDArray[np.uint8] = array
    return checked


def _of_8_bits(image: Image, name: str) -> Image:
    if image.mode.startswith("I;16"):
        from PIL import Image as pillow  # noqa: N813 - the module, beside its class

        values = np.asarray(image).astype(np.float32)
        return pillow.fromarray((values / 257).round().astype(np.uint8))
    if image.mode in _NO_RANGE:
        raise ConfigError(
            f"{name} holds numbers with no known range (Pillow's mode {image.mode})",
            "Save it with 8 or 16 bits a channel.",
        )
    return image


def opaque(image: Image, name: str) -> Image:
    """``image`` without its alpha channel; `ConfigError` where that hides anything."""
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() != (255, 255):
        raise ConfigError(
            f"{name} has see-through parts, whose colours nobody sees",
            "Put it on a background first, and save it without transparency.",
        )
    return rgba.convert("RGB")
