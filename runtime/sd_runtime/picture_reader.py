"""What a UNet reads of a picture in the place of a prompt: CLIP's image encoder, and a memory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from sd_runtime.arrays import copy_into
from sd_runtime.conditioning import PromptEmbeds
from sd_runtime.recent import Recent
from sd_runtime.task import IMAGE_ENCODER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sd_engines.engine import Engine
    from sd_runtime.conditioning import Encoded, Texts
    from sd_runtime.input_image import InputImage
    from sd_runtime.timing import Timings


class PictureReader:
    """Reads pictures one by one; remembers the last 64 (768 float32 are 3 KiB).

    ``engine`` opens a component's engine, or gives the one that is open.
    """

    def __init__(self, engine: Callable[[str], Engine]) -> None:
        self._engine = engine
        self._known: Recent[str, PromptEmbeds] = Recent(64)

    def encode(self, image: InputImage, groups: Sequence[Texts], *, timings: Timings) -> Encoded:
        """As `PromptEncoder.encode`, but every text is ``image``, and None is zeros beside it."""
        read = self._known.get(image.sha256, partial(self._read, image, timings))
        self._known.trim()
        return {
            group: tuple(read.zeros() if text is None else read for text in group)
            for group in groups
        }

    def forget(self) -> None:
        """Drop all that is kept."""
        self._known.clear()

    def _read(self, image: InputImage, timings: Timings) -> PromptEmbeds:
        engine = self._engine(IMAGE_ENCODER)
        with timings.measure(IMAGE_ENCODER):
            binding = engine.bind(1)
            size = int(engine.inputs["images"].shape[1])
            pixels = np.divide(image.middle_square(size), 255, dtype=np.float32)
            copy_into(binding.inputs["images"], pixels[None])
            binding.run()
            return PromptEmbeds(binding.outputs["image_embeds"][0].copy())
