"""Pictures to what is drawn from them: the VAE's encoder, the depth estimator, and a memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sd_engines.errors import ConfigError
from sd_engines.spec import DEPTH, IMAGE_LATENTS, LOW_RES_LATENTS
from sd_runtime.arrays import copy_into, to_host
from sd_runtime.recent import Recent
from sd_runtime.task import DEPTH_ESTIMATOR, DEPTH_MASK, ENCODER
from sd_runtime.tiles import Tiling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from sd_engines.engine import Engine
    from sd_engines.spec import Profile
    from sd_runtime.depth_map import DepthMap
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
    true where they are repainted, ``depth_mask`` is float32 [1, h, w], from −1 to 1, nearest.
    """

    posteriors: Mapping[Draw, Posterior] = field(default_factory=dict)
    mask: NDArray[np.bool_] | None = None
    depth_mask: NDArray[np.float32] | None = None


class ImageEncoder:
    """Encodes pictures one by one; its engines are opened when they are first needed.

    ``engine`` opens a component's engine, or gives the one that is open. Pictures take the size of
    ``profile``, except those whose latents are made larger. Where the encoder is made for smaller
    ones, it sees them by tiles. The last 16 sources are kept (of 64×64 latents, 260 KiB at most): a
    picture that many prompts start from is encoded once.
    """

    def __init__(self, engine: Callable[[str], Engine], profile: Profile) -> None:
        self._engine = engine
        self._profile = profile
        self._known: Recent[tuple[Task, tuple[object, ...]], Source] = Recent(16)

    def encode(
        self,
        task: Task,
        image: InputImage,
        mask: InputImage | None = None,
        depth_map: DepthMap | None = None,
        *,
        timings: Timings,
    ) -> Source:
        """What ``task`` draws from ``image``; raises what opening the engines raises.

        `ConfigError` where a picture or its ``depth_map`` has no depth.
        """
        given = (image, mask, depth_map)
        key = task, tuple(None if part is None else part.sha256 for part in given)
        make = partial(self._encode, task, image, mask, depth_map, timings)
        source = self._known.get(key, make)
        self._known.trim()
        return source

    def forget(self) -> None:
        """Drop every source that is kept."""
        self._known.clear()

    def _encode(
        self,
        task: Task,
        image: InputImage,
        mask: InputImage | None,
        depth_map: DepthMap | None,
        timings: Timings,
    ) -> Source:
        with timings.measure("load"):
            engine = self._engine(ENCODER)
            if task.feeds_depth and depth_map is None:
                self._engine(DEPTH_ESTIMATOR)
        height, width = self._profile.height, self._profile.width
        factor = self._profile.vae_scale_factor
        if LOW_RES_LATENTS in task.draws:
            height, width = image.image.height, image.image.width
        pixels = np.divide(image.pixels(height, width), 255, dtype=np.float32)
        pictures: dict[Draw, NDArray[np.float32]] = {"image": pixels, "low_res_latents": pixels}
        if depth_map is not None and IMAGE_LATENTS in task.draws:
            depth = depth_map.scaled(height, width)
            pictures["image_latents"] = np.concatenate([pixels, depth[..., None]], axis=-1)
        latent_mask = None
        if mask is not None:
            repainted = mask.mask(height, width)
            grey = np.float32(0.5)  # 0 to the encoder: so diffusers masks
            pictures["masked_image"] = np.where(repainted[..., None], grey, pixels)
            latent_mask = repainted[::factor, ::factor]  # torch's nearest: the upper left pixel
        posteriors = {
            name: self._posterior(engine, pictures[name], timings)
            for name in task.draws
            if name in pictures
        }
        depth_mask = None
        if task.feeds_depth:
            if depth_map is None:
                depth_mask = self._depth_mask(pixels, image.name, timings)
            else:
                depth_mask = depth_map.normalized(height // factor, width // factor)
        return Source(posteriors, latent_mask, depth_mask)

    def _depth_mask(
        self, picture: NDArray[np.float32], name: str, timings: Timings
    ) -> NDArray[np.float32]:
        """An estimate for a picture, float32 [H, W, 3] in 0 … 1."""
        with timings.measure(DEPTH_ESTIMATOR):
            binding = self._engine(DEPTH_ESTIMATOR).bind(1)
            copy_into(binding.inputs["images"], picture[None])
            binding.run()
            depth_mask: NDArray[np.float32] = to_host(binding.outputs[DEPTH_MASK])[0].copy()
        if not np.isfinite(depth_mask).all():  # nothing is nearer than anything else
            raise ConfigError(
                f"the bundle's depth estimator finds no depth in {name}",
                "Give it: --depth-map MAP; or take another picture.",
            )
        return depth_mask

    @staticmethod
    def _posterior(engine: Engine, picture: NDArray[np.float32], timings: Timings) -> Posterior:
        """Of a picture, float32 [H, W, 3] in 0 … 1; with a fourth channel, of its depth too."""
        high, wide = (int(size) for size in engine.outputs["latents"].shape[2:])
        factor = int(engine.inputs["images"].shape[1]) // high
        tiling = Tiling(picture.shape[0] // factor, picture.shape[1] // factor, high, wide)
        seen: dict[str, list[NDArray[np.float32]]] = {"latents": [], "latents_std": []}
        with timings.measure("vae_encoder"):
            binding = engine.bind(1)
            for top, left in (factor * np.array(tiling.tiles)).tolist():
                part = picture[top : top + factor * high, left : left + factor * wide]
                copy_into(binding.inputs["images"], part[None, ..., :3])
                if DEPTH in binding.inputs:
                    copy_into(binding.inputs[DEPTH], part[None, ..., 3:])
                binding.run()
                for name, parts in seen.items():
                    parts.append(to_host(binding.outputs[name])[0].copy())
        if len(tiling.tiles) == 1:
            return Posterior(*(parts[0] for parts in seen.values()))
        channels_last = [np.stack(parts).transpose(0, 2, 3, 1) for parts in seen.values()]
        return Posterior(*(tiling.join(parts).transpose(2, 0, 1) for parts in channels_last))
