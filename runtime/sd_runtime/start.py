"""What the loop starts from: the first latents of a task, and all that is drawn before them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sd_runtime.image_encoder import Source
from sd_runtime.task import DEPTH_MASK, UPSCALER_INPUTS
from sd_runtime.update import Known

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from sd_runtime.noise import NoiseStream
    from sd_runtime.table import SchedulerTable
    from sd_runtime.task import Draw, Task

    Latents = NDArray[np.float32]


@dataclass(frozen=True)
class Start:
    """Of n pictures, float32 [n, …]: their first latents, and what `denoise` takes besides."""

    latents: Latents
    unet_inputs: Mapping[str, Latents] = field(default_factory=dict)
    known: Known | None = None


def begin(
    task: Task,
    streams: Sequence[NoiseStream],
    shape: tuple[int, ...],
    table: SchedulerTable,
    *,
    sources: Sequence[Source] = (),
) -> Start:
    """Draw what ``task`` draws, each picture from its own stream, and mix the first latents.

    ``shape`` is one picture's latents'; ``sources`` are there, one a picture and all with one mask,
    for every task but text-to-image.
    """
    drawn: dict[Draw, list[Latents]] = {name: [] for name in task.draws}
    for stream, source in zip(streams, sources or [Source()] * len(streams), strict=True):
        for name in task.draws:
            if name in source.posteriors:
                drawn[name].append(source.posteriors[name].sample(stream))
            else:
                drawn[name].append(stream.normal((1, *shape))[0])
    stacked = {name: np.stack(latents) for name, latents in drawn.items()}
    noise = stacked["noise"]
    if task.mixes_image:
        alpha, sigma = float(table.noised_alpha[0]), float(table.noised_sigma[0])
        latents = alpha * stacked["image"] + sigma * noise
    else:
        latents = table.init_noise_scale * noise
    fed: dict[str, Latents] = {name: stacked[name] for name in UPSCALER_INPUTS if name in stacked}
    if fed:
        return Start(latents, fed)
    if sources and sources[0].depth_mask is not None:
        return Start(latents, {DEPTH_MASK: sources[0].depth_mask[None]})
    mask = sources[0].mask if sources else None
    if mask is None:
        return Start(latents)
    repainted = np.broadcast_to(mask.astype(np.float32), noise.shape)
    if task.feeds_mask:
        masked = stacked["masked_image"]
        return Start(latents, {"mask": repainted[:, :1], "masked_image_latents": masked})
    kept = 1 - repainted
    return Start(latents, known=Known(kept * stacked["image"], kept * noise, repainted))
