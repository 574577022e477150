"""How near each part of a picture is, as somebody measured or estimated it: read and checked.

To a depth-to-image checkpoint only differences count: what diffusers'
StableDiffusionDepth2ImgPipeline makes of its ``depth_map``. To LDM3D's upscaler values do, as its
VaeImageProcessorLDM3D reads them.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sd_engines.errors import ConfigError
from sd_runtime.input_image import opaque, opened_image, readable

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

_SHARPNESS = -0.75
"""The free number of cubic convolution, as torch has it."""
_HINT = (
    "Give a grey picture of 8 or 16 bits, brighter is nearer; or numbers of shape (height, width), "
    "as an array or a .npy file, greater is nearer."
)


@dataclass(frozen=True)
class DepthMap:
    """How near each part of a picture is, in any unit, greater is nearer; of any size.

    ``sha256`` is of its size, its values and ``white``, so that the same map in another file is
    equal. ``name`` is for people, ``values`` are float32 [h, w]. ``white`` is what stands for 1
    among them: 65535 or 255, by the bits of their file or array; None where they have no known
    range.
    """

    sha256: str
    name: str = field(compare=False)
    values: NDArray[np.float32] = field(compare=False, repr=False)
    white: int | None

    @classmethod
    def of(cls, source: object, *, name: str) -> Self:
        """From a path, a Pillow picture, or numbers [h, w].

        ``name`` is what to call a map that has no path. Raises `ConfigError` for what is none, is
        in colours, not finite, or the same everywhere.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, str | os.PathLike):
            name = os.fspath(source)
        if isinstance(source, np.ndarray):
            array: NDArray[Any] = source
        else:
            with readable(name):
                if isinstance(source, str | os.PathLike) and Path(source).suffix == ".npy":
                    # mapped, so that no header asks for more memory than its file has bytes
                    array = np.lib.format.open_memmap(source, mode="r")
                else:
                    array = _grey(opened_image(source, name), name)
        if array.ndim != 2 or not array.size or array.dtype.kind not in "uif":
            raise ConfigError(
                f"{name} is no depth map, but {array.dtype} of shape {array.shape}", _HINT
            )
        values = np.array(array, np.float32, order="C")  # a copy: the caller's may change later
        if not np.isfinite(values).all():
            raise ConfigError(f"{name} holds values that are not finite", _HINT)
        if values.min() == values.max():
            raise ConfigError(f"{name} is equally near everywhere", _HINT)
        whole = array.dtype.kind == "u" and array.dtype.itemsize <= 2
        white = int(np.iinfo(array.dtype).max) if whole else None
        of = "" if white is None else f" of {white}"
        header = f"depth {values.shape[1]}x{values.shape[0]}{of}\n".encode()
        digest = hashlib.sha256(header + values.astype("<f4").tobytes()).hexdigest()
        return cls(digest, name, values, white)

    def check_range(self) -> None:
        """`ConfigError` where values have no known range, as `scaled` needs one."""
        if self.white is None:
            raise ConfigError(
                f"{self.name} holds numbers with no known range, and the bundle reads the values",
                "Give a grey picture of 8 or 16 bits, such as the .depth.png that an LDM3D draws; "
                "or an array or .npy file of uint8 or uint16.",
            )

    def scaled(self, height: int, width: int) -> NDArray[np.float32]:
        """float32 [height, width] in 0 … 1, as diffusers' VaeImageProcessorLDM3D reads 16 bits.

        By Lanczos' filter of Pillow, rounded to 16 bits, divided by 65535; that processor loses the
        bilinear filter that the upscaler's pipeline asks it for. Of 8 bits, white is made 65535
        first: diffusers divides those by 65535 too, which leaves next to nothing of them.
        `check_range` comes first.
        """
        from PIL import Image

        widened = (self.values * (65535 // (self.white or 65535))).astype(np.uint16)
        resized = Image.fromarray(widened).resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(resized).astype(np.float32) / np.float32(65535)

    def normalized(self, height: int, width: int) -> NDArray[np.float32]:
        """float32 [1, height, width] from −1, the farthest, to 1; as diffusers resizes it.

        By cubic convolution (Keys 1981, doi:10.1109/TASSP.1981.1163711) without a filter. Raises
        `ConfigError` where nothing is left of its differences.
        """
        rows, columns = (
            _resize_weights(*sizes)
            for sizes in zip(self.values.shape, (height, width), strict=True)
        )
        depth = (rows @ self.values @ columns.T).astype(np.float32)
        low, high = depth.min(), depth.max()
        if low == high:
            raise ConfigError(f"{self.name} is equally near everywhere, once resized", _HINT)
        normalized: NDArray[np.float32] = 2 * (depth[None] - low) / (high - low) - 1
        return normalized


def _grey(image: Image, name: str) -> NDArray[Any]:
    """The values of a picture of one channel, or of several that are alike."""
    if image.mode in ("L", "I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)
    channels = np.asarray(opaque(image, name).convert("RGB"))
    if (channels != channels[..., :1]).any():
        raise ConfigError(f"{name} is in colours, which say nothing of depth", _HINT)
    return channels[..., 0]


def _resize_weights(size: int, resized: int) -> NDArray[np.float32]:
    """Of ``size`` values along one axis in each of ``resized``, float32 [resized, size].

    What lies beyond an edge is the edge's.
    """
    centres = (np.arange(resized) + 0.5) * (size / resized) - 0.5
    first = np.floor(centres).astype(int)
    weights = np.zeros((resized, size))
    a = _SHARPNESS
    for neighbour in (first - 1, first, first + 1, first + 2):
        x = np.abs(centres - neighbour)
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        at = np.arange(resized), neighbour.clip(0, size - 1)
        np.add.at(weights, at, np.where(x <= 1, near, far))
    return weights.astype(np.float32)
