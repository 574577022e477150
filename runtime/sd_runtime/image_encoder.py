"""Pictures to the posterior of their latents: the VAE's encoder, and a memory of the last ones."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sd_runtime.arrays import copy_into, to_host

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from sd_engines.engine import Engine
    from sd_runtime.input_image import InputImage
    from sd_runtime.noise import NoiseStream
    from sd_runtime.task import Draw, Task
    from sd_runtime.timing import Timings


class Posterior(NamedTuple):
    """The normal distribution of a picture's latents, float32 [c, h, w] each, scaled.

    Kingma & Welling 2014 (arXiv:1312.6114), section 3.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def sample(self, stream: NoiseStream) -> NDArray[np.float32]:
        """One draw of ``stream``, float32 [c, h, w]."""
        latents: NDArray[np.float32] = stream.normal((1, *self.mean.shape))[0]
        latents *= self.std
        latents += self.mean
        return latents


@dataclass(frozen=True)
class Source:
    """What pictures start from, where they do not start from noise alone.

    ``posteriors`` are of the pictures that a task draws, ``mask`` is bool [h, w] of the latents,
    true where they are repainted.
    """

    posteriors: Mapping[Draw, Posterior] = field(default_factory=dict)
    mask: NDArray[np.bool_] | None = None


class ImageEncoder:
    """Encodes pictures one by one; its engine is opened when the first one comes.

    The last ``capacity`` sources are kept (of 64×64 latents, 260 KiB at most): a picture that many
    prompts start from is encoded once.
    """

    def __init__(self, open_engine: Callable[[], Engine], *, capacity: int = 16) -> None:
        self._open_engine = open_engine
        self._capacity = capacity
        self._known: OrderedDict[tuple[Task, str, str | None], Source] = OrderedDict()

    def encode(
        self, task: Task, image: InputImage, mask: InputImage | None, *, timings: Timings
    ) -> Source:
        """What ``task`` draws from ``image``; raises what opening the engine raises."""
        key = task, image.sha256, None if mask is None else mask.sha256
        if key not in self._known:
            self._known[key] = self._encode(task, image, mask, timings)
        self._known.move_to_end(key)
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return self._known[key]

    def forget(self) -> None:
        """Drop every source that is kept."""
        self._known.clear()

    def _encode(
        self, task: Task, image: InputImage, mask: InputImage | None, timings: Timings
    ) -> Source:
        with timings.measure("load"):
            engine = self._open_engine()
        height, width = (int(size) for size in engine.inputs["images"].shape[1:3])
        pixels = np.divide(image.pixels(height, width), 255, dtype=np.float32)
        pictures: dict[Draw, NDArray[np.float32]] = {"image": pixels}
        latent_mask = None
        if mask is not None:
            repainted = mask.mask(height, width)
            grey = np.float32(0.5)  # 0 to the encoder: so diffusers masks
            pictures["masked_image"] = np.where(repainted[..., None], grey, pixels)
            factor = height // int(engine.outputs["latents"].shape[2])
            latent_mask = repainted[::factor, ::factor]  # torch's nearest: the upper left pixel
        posteriors = {
            name: self._posterior(engine, pictures[name], timings)
            for name in task.draws
            if name in pictures
        }
        return Source(posteriors, latent_mask)

    @staticmethod
    def _posterior(engine: Engine, picture: NDArray[np.float32], timings: Timings) -> Posterior:
        """Of a picture, float32 [H, W, 3] in 0 … 1."""
        with timings.measure("vae_encoder"):
            binding = engine.bind(1)
            copy_into(binding.inputs["images"], picture[None])
            binding.run()
            mean, std = (to_host(binding.outputs[name])[0] for name in ("latents", "latents_std"))
            return Posterior(mean.copy(), std.copy())
