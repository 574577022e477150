"""Is it the same picture? A bundle against unmodified diffusers, for every scheduler name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from sd_engines.errors import ConfigError
from sd_export.oracle import load_pipeline, use_scheduler
from sd_export.source import find_checkpoint
from sd_export.verify import pixels_within_1, relative_l2
from sd_runtime import Request
from sd_runtime.command import raise_received_signal
from sd_runtime.scheduler_config import SCHEDULERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sd_runtime import Pipeline

_SEED: Final = 0


@dataclass(frozen=True)
class Parity:
    """One scheduler's picture beside diffusers'."""

    scheduler: str
    latents_error: float
    """Relative L2 of the final latents."""
    pixels_within_1: float
    """Share of the picture's values that differ by at most 1 of 255."""


def measure_parity(
    pipeline: Pipeline,
    prompt: str,
    *,
    model: str | None,
    schedulers: Iterable[str],
    num_inference_steps: int,
    guidance_scale: float,
    height: int | None,
    width: int | None,
) -> Iterator[Parity]:
    """Draw ``prompt`` twice per scheduler, by the bundle and by diffusers in fp32 on the CPU.

    ``height`` and ``width`` choose one of the bundle's sizes, in pixels.
    ``model`` is the checkpoint, None: the one that the bundle names. diffusers gets the same seed
    through ``torch.Generator("cpu")``. Raises `ExportError` where the checkpoint is not found.
    """
    import torch

    source = model or pipeline.bundle.manifest.model.source
    try:
        checkpoint = find_checkpoint(source)
    except ConfigError as error:
        if model is not None:
            raise
        raise ConfigError(
            f"the bundle was made from {source!r}, which is not here",
            "Say where the checkpoint lies: --model FOLDER; or run it where that path leads to it.",
        ) from error
    oracle = load_pipeline(checkpoint)
    config = dict(oracle.scheduler.config)
    for name in schedulers:
        raise_received_signal()
        sampler = SCHEDULERS[name]
        use_scheduler(oracle, sampler.class_name, {**config, **sampler.overrides})
        request = Request(
            prompt,
            seed=_SEED,
            scheduler=name,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
        )
        ours = pipeline.generate(request)
        latents = oracle(
            prompt,
            height=ours.pixels.shape[1],
            width=ours.pixels.shape[2],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator("cpu").manual_seed(_SEED),
            output_type="latent",
        ).images
        with torch.no_grad():
            decoded = oracle.vae.decode(latents / oracle.vae.config.scaling_factor).sample
        images = oracle.image_processor.postprocess(decoded, output_type="np")
        pixels = np.round(images * 255).astype(np.uint8)
        yield Parity(
            scheduler=name,
            latents_error=relative_l2(ours.latents, latents.numpy()),
            pixels_within_1=pixels_within_1(ours.pixels, pixels),
        )
