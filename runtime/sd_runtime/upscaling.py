"""Making a picture larger: what an upscaler's UNet is shown of it, tile by tile.

The x4 upscaler's small picture has as many pixels as the latents have places, and goes into the
UNet beside them, with noise on it so that the UNet does not take its flaws for detail (Ho et al.
2021, arXiv:2106.15282, section 4; Rombach et al. 2022, arXiv:2112.10752, section 4.4). The x2
latent upscaler's UNet is shown latents of it, a quarter as many as it draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.errors import BundleError, ConfigError
from sd_engines.node import REMAKE_HINT
from sd_engines.spec import LOW_RES_IMAGE, LOW_RES_LATENTS
from sd_runtime.image_encoder import Posterior, Source
from sd_runtime.noise_schedule import Level, noise_schedule
from sd_runtime.scheduler_config import effective_config
from sd_runtime.task import UPSCALER_INPUTS, gives_depth
from sd_runtime.tiles import Tile, TileNoise, Tiling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from sd_engines.manifest import Manifest
    from sd_runtime.input_image import InputImage
    from sd_runtime.request import ImageRequest, Request

DEFAULT_NOISE_LEVEL = 20
"""What diffusers' StableDiffusionUpscalePipeline takes where it is not told."""
_FIRST = Tile(0, 0)


@dataclass(frozen=True)
class Upscaling:
    """A picture that is to be ``scale`` times as large, and the noise that is put on it first.

    Without a ``level`` the UNet is shown latents of it, which the VAE's encoder makes.
    """

    image: InputImage
    scale: int
    tiling: Tiling
    level: Level | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what comes out, in pixels."""
        return self.scale * self.tiling.height, self.scale * self.tiling.width

    def tiles_of(self, images: Sequence[ImageRequest]) -> tuple[ImageRequest, ...]:
        """What is drawn for ``images``: the tiles of the first, then those of the next."""
        return tuple(image._replace(tile=tile) for image in images for tile in self.tiling.tiles)

    def part(self, image: ImageRequest) -> NDArray[np.uint8]:
        """The pixels of one of `tiles_of`, uint8 [h, w, 3]."""
        return self.tiling.cut(self._pixels, image.tile or _FIRST)

    def noise(self, image: ImageRequest) -> TileNoise:
        """The random draws of one of `tiles_of`."""
        tiling = self.tiling
        return TileNoise(
            image.seed,
            image.tile or _FIRST,
            tile_height=tiling.tile_height,
            tile_width=tiling.tile_width,
        )

    def join(self, drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pictures uint8 [n, height, width, 3] of the tiles of each, in the order of `tiles_of`."""
        tiles = drawn.reshape(-1, len(self.tiling.tiles), *drawn.shape[1:])
        return np.stack([self.tiling.join(picture).round().astype(np.uint8) for picture in tiles])

    @cached_property
    def _pixels(self) -> NDArray[np.uint8]:
        return self.image.pixels(self.tiling.height, self.tiling.width)


def noised(pixels: NDArray[np.uint8], level: Level) -> Source:
    """What a UNet is shown of a picture's ``pixels``: a draw of a posterior, float32 [3, h, w]."""
    mean: NDArray[np.float32] = np.divide(pixels.transpose(2, 0, 1), 255, dtype=np.float32)
    mean *= 2
    mean -= 1
    mean *= np.float32(level.alpha)
    return Source({LOW_RES_IMAGE: Posterior(mean, np.full(mean.shape, level.sigma, np.float32))})


def noise_level_of(request: Request, manifest: Manifest) -> int:
    """How much noise is put on the small picture that ``request`` gives to an upscaler's bundle.

    LDM3D's is told of it and no more, as by its pipeline in diffusers: nobody puts it there.
    Raises `ConfigError` where it asks for what an upscaler does not do, `BundleError` where the
    bundle does not say what noise its UNet knows.
    """
    if request.image is None:
        raise ConfigError(
            "the bundle is an upscaler: it makes a picture larger",
            "Give it one: --image PICTURE.",
        )
    sees_depth = gives_depth(manifest)
    for name in ("mask", "strength") if sees_depth else ("mask", "strength", "depth_map"):
        if getattr(request, name) is not None:
            raise ConfigError(
                f"{name} is not for an upscaler, which makes the whole picture larger",
                f"Leave {name} out; it draws from noise, led by the picture.",
            )
    if sees_depth:
        if request.depth_map is None:
            raise ConfigError(
                "the bundle is LDM3D's upscaler: it makes a picture and its depth larger",
                "Give that too: --depth-map MAP, such as the .depth.png beside an LDM3D's picture.",
            )
        request.depth_map.check_range()
    most = manifest.model.max_noise_level
    if most is None:
        raise _silent()
    default = min(DEFAULT_NOISE_LEVEL, most)
    noise_level = default if request.noise_level is None else request.noise_level
    if noise_level > most:
        raise ConfigError(
            f"noise_level is {noise_level}, and the upscaler knows {most} at most",
            f"Take 0 to {most}, such as {default}; or leave it out.",
        )
    return noise_level


def upscaling_of(request: Request, manifest: Manifest) -> Upscaling:
    """What ``request`` comes to on the bundle of an upscaler that works by tiles.

    Raises as `noise_level_of`, and `ConfigError` for a size that does not come out.
    """
    noise_level, scheduler = noise_level_of(request, manifest), manifest.model.low_res_scheduler
    (shown,) = (spec for spec in manifest.components["unet"].inputs if spec.name in UPSCALER_INPUTS)
    profile, given = manifest.profile, request.image.image
    grid, level = 1, None
    if shown.name == LOW_RES_LATENTS:
        grid = profile.vae_scale_factor
    elif scheduler is None:
        raise _silent()
    else:
        level = low_res_level(scheduler, noise_level)
    height, width = (grid * int(size) for size in shown.shape[2:])
    upscaling = Upscaling(
        image=request.image,
        scale=profile.height // height,
        tiling=Tiling(given.height, given.width, height, width, grid),
        level=level,
    )
    height, width = upscaling.size
    if (request.height or height, request.width or width) != (height, width):
        raise ConfigError(
            f"a picture of {given.height}×{given.width} (height × width) comes out {height}×{width}"
            f", not {request.height or height}×{request.width or width}",
            "Leave the size out, and resize what comes out.",
        )
    return upscaling


def fitting(request: Request, manifest: Manifest) -> Manifest:
    """``manifest`` with the size that the picture comes out in as its own, if it has that size.

    Raises as `upscaling_of`.
    """
    size = upscaling_of(request, manifest).size
    built = {(entry.profile.height, entry.profile.width) for entry in manifest.all_sizes}
    return manifest.at(*size) if size in built else manifest


def low_res_level(scheduler_config: Mapping[str, Any], noise_level: int) -> Level:
    """Signal and noise of the small picture at a noise level, a timestep of its scheduler.

    `ConfigError` for a schedule that is not known, or a level past its end.
    """
    # Clipping is for samples that are predicted; here noise is put on pixels.
    config = effective_config({**scheduler_config, "clip_sample": False}, "DDPMScheduler")
    return noise_schedule(config, min_alpha_cumprod=0.0).level_at(noise_level)


def _silent() -> BundleError:
    return BundleError(
        "the bundle is an upscaler's and does not say what noise its UNet is shown", REMAKE_HINT
    )
