"""What comes out of a pipeline: the steps on the way, and the pictures at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sd_runtime.files import depth_path, numbered_paths, write_files
from sd_runtime.image import encode_image, format_named, format_of
from sd_runtime.recipe import text_from_recipes

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from sd_engines.engine import Array
    from sd_runtime.recipe import Recipe
    from sd_runtime.request import Request
    from sd_runtime.timing import Timings


@dataclass(frozen=True)
class Result:
    """The pictures of one request, in its order.

    ``pixels`` uint8 [n, H, W, 3]; ``device_pixels`` are the same where the VAE left them, CuPy's on
    a GPU, for whoever takes DLPack, as ``torch.from_dlpack(result.device_pixels)`` does.
    ``latents`` float32 [n, c, h, w], as the decoder got them, and of every tile of an upscaled
    picture; ``nsfw_content_detected`` is one bool per picture, None without a safety checker; what
    it finds is painted black. ``request`` is the one that ran, its seed filled in. ``depth`` uint16
    [n, H, W] are the depth maps that an LDM3D paints; None of all others.
    """

    request: Request
    pixels: NDArray[np.uint8]
    device_pixels: Array
    latents: NDArray[np.float32]
    nsfw_content_detected: tuple[bool, ...] | None
    recipes: tuple[Recipe, ...]
    timings: Timings
    depth: NDArray[np.uint16] | None = None

    @property
    def images(self) -> list[Image]:
        """The pictures for Pillow. Its own ``save`` writes no recipe; `save` does."""
        from PIL import Image

        return [Image.fromarray(pixels) for pixels in self.pixels]

    def encode(self, index: int, format_: str) -> bytes:
        """Picture ``index`` as the bytes of a PNG, JPEG or WebP file with its recipe.

        ``format_`` as `format_named` takes it.
        """
        recipe, format_ = self.recipes[index], format_named(format_)
        with self.timings.measure(format_.lower()):
            return encode_image(
                self.pixels[index],
                format_,
                parameters=recipe.parameters(),
                recipe=text_from_recipes([recipe], columns=1),
            )

    def encode_depth(self, index: int) -> bytes:
        """Depth map ``index`` as the bytes of a PNG of 16 bits of grey, with the same recipe.

        `ValueError` where there is none.
        """
        if self.depth is None:
            raise ValueError("the result has no depth maps")
        recipe = text_from_recipes([self.recipes[index]], columns=1)
        with self.timings.measure("png"):
            return encode_image(self.depth[index], "PNG", recipe=recipe)

    def files(self, index: int, path: Path) -> dict[Path, bytes]:
        """What is to be written where picture ``index`` goes to ``path``.

        Its depth map first, where there is one, so that whoever sees a picture has all of it.
        """
        depth = {} if self.depth is None else {depth_path(path): self.encode_depth(index)}
        return {**depth, path: self.encode(index, format_of(path))}

    def save(self, path: str | Path) -> list[Path]:
        """Write all pictures with their recipes; several get ``-0``, ``-1``, … before the suffix.

        Depth maps go beside them (`depth_path`). All are written or none; returns the pictures'
        paths. Raises `ConfigError` for an unknown suffix, `SdError` where the disk refuses.
        """
        paths = numbered_paths(Path(path), len(self.pixels))
        contents: dict[Path, bytes] = {}
        for index, file in enumerate(paths):
            contents |= self.files(index, file)
        write_files(contents)
        return paths


@dataclass(frozen=True)
class Step:
    """One UNet call of a request; the last one holds the `Result`.

    ``index`` counts 0 … num_steps − 1 over the whole request, whose pictures run in batches:
    ``first_image`` is the first of this batch. Of upscaled pictures it counts tiles, and what there
    is of each is its latents and its preview.
    """

    index: int
    num_steps: int
    timestep: float
    first_image: int
    read_latents: Callable[[], Array] = field(repr=False)
    decode_preview: Callable[[], NDArray[np.uint8]] = field(repr=False)
    result: Result | None = None

    @property
    def latents(self) -> Array:
        """What the step made, float32 [n, c, h, w] in the variance-preserving scale.

        On a GPU it is waited for, so that any stream may read it. It is the loop's own: what must
        outlive the step is to be copied, to the end, before the next one.
        """
        return self.read_latents()

    def preview(self) -> NDArray[np.uint8]:
        """What the pictures would be now, uint8 [n, H, W, 3]: one run of the decoder.

        Only while this step is the newest.
        """
        return self.decode_preview()
