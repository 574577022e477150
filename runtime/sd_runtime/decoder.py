"""Latents to pictures: the VAE's decoder, and the safety checker's word on what it made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sd_engines.errors import BackendError
from sd_runtime.arrays import copy_into, to_host
from sd_runtime.denoise import predicted_original_sample

if TYPE_CHECKING:
    from collections.abc import Callable

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


class Decoder:
    """Draws with the ``vae_decoder`` of a bundle, and checks with its ``safety_checker`` if any.

    ``engine`` opens a component's engine, or gives the one that is open. Previews are drawn by the
    ``preview_decoder`` where there is one.
    """

    def __init__(self, engine: Callable[[str], Engine], manifest: Manifest) -> None:
        self._engine = engine
        self._prediction_type = manifest.model.prediction_type
        self._previewer = next(name for name in _PREVIEWERS if name in manifest.components)
        self.checks = "safety_checker" in manifest.components

    def draw(self, latents: Array, *, timings: Timings) -> tuple[NDArray[np.uint8], list[bool]]:
        """Pictures uint8 [n, H, W, 3] and the safety checker's word on each.

        `BackendError` where they are no pictures.
        """
        with timings.measure("vae_decoder"):
            images = self._decode(latents)
        # Checked only now: on a GPU, looking at the latents earlier would wait for them twice.
        _check_finite("the UNet", to_host(latents))
        _check_finite("the VAE decoder", images)
        pixels = _pixels_from(images)
        if (pixels == pixels[:, :1, :1]).all(axis=(1, 2, 3)).any():
            raise BackendError(
                "the VAE decoder returned a picture of one single colour", PRECISION_HINT
            )
        if not self.checks:
            return pixels, []
        with timings.measure("safety_checker"):
            checker = self._engine("safety_checker").bind(len(pixels))
            copy_into(checker.inputs["images"], pixels.astype(np.float32) / 255)
            checker.run()
            flags = to_host(checker.outputs["nsfw_content_detected"])
        pixels[flags] = 0
        return pixels, flags.tolist()

    def preview(self, row: Row) -> NDArray[np.uint8]:
        """What the pictures would be at ``row``, uint8 [n, H, W, 3]."""
        latents = predicted_original_sample(row, self._prediction_type)
        return _pixels_from(self._decode(latents, by=self._previewer))

    def _decode(self, latents: Array, *, by: str = "vae_decoder") -> NDArray[np.float32]:
        """float32 [n, H, W, 3], 0 … 1, in the decoder's own buffer."""
        decoder = self._engine(by).bind(len(latents))
        copy_into(decoder.inputs["latents"], latents)
        decoder.run()
        return to_host(decoder.outputs["images"])


def _pixels_from(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """0 … 1 to 0 … 255, rounded as diffusers rounds."""
    return (images * 255).round().astype(np.uint8)


def _check_finite(source: str, array: NDArray[np.float32]) -> None:
    if not np.isfinite(array).all():
        raise BackendError(f"{source} returned values that are not finite (NaN)", PRECISION_HINT)
