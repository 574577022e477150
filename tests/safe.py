"""Diffusers' own pipeline of Safe Stable Diffusion, and what it draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from sd_runtime import Request


def safe_pipeline(components: dict[str, Any], *, scheduler: Any = None) -> Any:
    """StableDiffusionPipelineSafe of the ``components`` of another pipeline."""
    from diffusers import StableDiffusionPipelineSafe

    parts = {**components, "scheduler": scheduler or components["scheduler"]}
    pipeline = StableDiffusionPipelineSafe(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def safe_expected(pipeline: Any, request: Request) -> tuple[np.ndarray, np.ndarray]:
    """What it makes of ``request``: pixels uint8 and final latents."""
    from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig

    latents: list[np.ndarray] = []
    concept = pipeline.safety_concept
    pipeline.safety_concept = request.safety_concept or concept
    try:
        output = pipeline(
            list(request.prompts),
            negative_prompt=[text or "" for text in request.negative_prompts],
            generator=[torch.Generator("cpu").manual_seed(i.seed) for i in request.images()],
            num_inference_steps=request.num_inference_steps,
            num_images_per_prompt=request.num_images_per_prompt,
            guidance_scale=7.5 if request.guidance_scale is None else request.guidance_scale,
            callback=lambda _step, _timestep, last: latents.append(last.numpy().copy()),
            **getattr(SafetyConfig, str(request.safety_guidance).upper()),
        )
    finally:
        pipeline.safety_concept = concept
    pixels = np.stack([np.asarray(image) for image in output.images])
    return pixels, latents[-1]
