"""Latents to pictures and depth maps: the VAE's decoder, and the safety checker's word on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sd_engines.errors import BackendError
from sd_engines.spec import DEPTH
from sd_runtime.arrays import copy_into, to_host
from sd_runtime.denoise import predicted_original_sample
from sd_runtime.task import gives_depth
from sd_runtime.tiles import Tiling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from sd_engines.engine import Array, Engine
    from sd_engines.manifest import Manifest
    from sd_runtime.denoise import Row
    from sd_runtime.timing import Timings

PRECISION_HINT = (
    "Nothing was kept. Try another --backend or a bundle of higher precision: "
    "sd-export --model MODEL --precision fp32 --output BUNDLE."
)
_PREVIEWERS = ("preview_decoder", "vae_decoder")


class Decoded(NamedTuple):
    """Pictures uint8 [n, H, W, 3], and depth maps uint16 [n, H, W] where the VAE paints them.

    The pictures are where the VAE left them. ``flags`` are the safety checker's word on each; None
    without one.
    """

    pixels: Array
    depth: NDArray[np.uint16] | None
    flags: list[bool] | None


class Decoder:
    """Draws with the ``vae_decoder`` of a bundle, and checks with its ``safety_checker`` if any.

    ``engine`` opens a component's engine, or gives the one that is open. Previews are drawn by the
    ``preview_decoder`` where there is one.
    """

    def __init__(self, engine: Callable[[str], Engine], manifest: Manifest) -> None:
        self._engine = engine
        self._prediction_type = manifest.model.prediction_type
        self._previewer = next(name for name in _PREVIEWERS if name in manifest.components)
        self._gives_depth = gives_depth(manifest)
        self._checks = "safety_checker" in manifest.components

    def draw(self, latents: Array, *, may_be_plain: bool = False, timings: Timings) -> Decoded:
        """What the latents show; black and of no depth where the safety checker flags it.

        `BackendError` where that is no picture, or one of one single colour: a sign of a broken
        engine, but of what ``may_be_plain``, as a tile of a sky is.
        """
        with timings.measure("vae_decoder"):
            outputs = self._decode(latents)
            images = outputs["images"]
            is_finite = _is_finite(images)  # on a GPU, waits for all that leads to them
        # The latents only now: on a GPU, looking at them earlier would wait twice.
        _check_finite("the UNet", is_finite=_is_finite(latents))
        _check_finite("the VAE decoder", is_finite=is_finite)
        pixels = _pixels_from(images)
        depth = depth_from_channels(to_host(outputs[DEPTH])) if self._gives_depth else None
        if not may_be_plain and (pixels == pixels[:, :1, :1]).all(axis=(1, 2, 3)).any():
            raise BackendError(
                "the VAE decoder returned a picture of one single colour", PRECISION_HINT
            )
        if not self._checks:
            return Decoded(pixels, depth, None)
        with timings.measure("safety_checker"):
            checker = self._engine("safety_checker").bind(len(pixels))
            copy_into(checker.inputs["images"], pixels.astype(np.float32) / 255)
            checker.run()
            flags = to_host(checker.outputs["nsfw_content_detected"])
        for index in np.flatnonzero(flags):
            pixels[index] = 0
            if depth is not None:
                depth[index] = 0
        return Decoded(pixels, depth, flags.tolist())

    def preview(self, row: Row) -> NDArray[np.uint8]:
        """What the pictures would be at ``row``, uint8 [n, H, W, 3]."""
        latents = predicted_original_sample(row, self._prediction_type)
        return to_host(_pixels_from(self._decode(latents, by=self._previewer)["images"]))

    def _decode(self, latents: Array, *, by: str = "vae_decoder") -> Mapping[str, Array]:
        """What the decoder gives, in its own buffers; of larger latents than it takes, by tiles."""
        engine = self._engine(by)
        decoder = engine.bind(len(latents))
        height, width = latents.shape[2:]
        tile_height, tile_width = (int(size) for size in engine.inputs["latents"].shape[2:])
        if (height, width) == (tile_height, tile_width):
            copy_into(decoder.inputs["latents"], latents)
            decoder.run()
            return decoder.outputs
        tiling = Tiling(height, width, tile_height, tile_width)
        drawn: dict[str, list[NDArray[np.float32]]] = {name: [] for name in engine.outputs}
        for top, left in tiling.tiles:
            part = latents[:, :, top : top + tile_height, left : left + tile_width]
            copy_into(decoder.inputs["latents"], part)
            decoder.run()
            for name, parts in drawn.items():
                parts.append(to_host(decoder.outputs[name]).copy())
        return {
            name: np.stack([tiling.join(tiles) for tiles in np.stack(parts, axis=1)])
            for name, parts in drawn.items()
        }


def depth_from_channels(channels: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Depth maps uint16 [n, H, W] from what an LDM3D paints, float32 [n, H, W, 1 or 3] in 0 … 1.

    One channel is the depth; three are a picture of it, whose green is the high byte and blue the
    low (Stan et al. 2023, arXiv:2305.10853). Rounded as diffusers'
    VaeImageProcessorLDM3D rounds: to the nearest byte, but one channel down.
    """
    if channels.shape[-1] == 1:
        return (channels[..., 0] * 65535).astype(np.uint16)
    painted: NDArray[np.uint16] = _pixels_from(channels).astype(np.uint16)
    return painted[..., 1] * np.uint16(256) + painted[..., 2]


def _pixels_from(images: Array) -> Array:
    """0 … 1 to 0 … 255, rounded as diffusers rounds."""
    return (images * 255).round().astype(np.uint8)


def _is_finite(array: Array) -> bool:
    return bool(np.isfinite(array).all())


def _check_finite(source: str, *, is_finite: bool) -> None:
    if not is_finite:
        raise BackendError(f"{source} returned values that are not finite (NaN)", PRECISION_HINT)
