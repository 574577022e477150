"""A compiled schedule as JSON, for services that run the table themselves, without Python.

Every number is written so that reading it gives the same double. docs/embedding.md says what the
fields mean, and embed/include/sd_table.hpp runs them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.errors import ConfigError
from sd_runtime.plan import plan
from sd_runtime.task import check_served, plainest_request

if TYPE_CHECKING:
    from sd_engines.manifest import Manifest

FORMAT_VERSION = 1


def schedule_of(
    manifest: Manifest,
    *,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_start: float = 0.0,
    guidance_stop: float = 1.0,
    eta: float = 0.0,
    strength: float | None = None,
) -> dict[str, Any]:
    """All that a denoising loop needs to know of a bundle and these settings, ready for JSON.

    A ``strength`` makes it one of image-to-image. Raises as `plan` does.
    """
    check_served(manifest)
    if manifest.model.requires_aesthetics_score:
        raise ConfigError(
            "a refiner has no schedule to hand on: its UNet is told one thing beside the prompt, "
            "and another beside the negative prompt",
            "Draw with it by sd-run BUNDLE PROMPT --image PICTURE, or in Python.",
        )
    request = plainest_request(manifest)
    if strength is not None and request.image is None:
        request = replace(request, image=np.zeros((1, 1, 3), np.uint8))
    planned = plan(
        replace(
            request,
            scheduler=scheduler,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_start=guidance_start,
            guidance_stop=guidance_stop,
            eta=eta,
            strength=strength,
        ),
        manifest,
    )
    table = planned.table
    return {
        "format_version": FORMAT_VERSION,
        "task": planned.task.name,
        "scheduler": planned.scheduler,
        "prediction_type": manifest.model.prediction_type,
        "num_inference_steps": planned.num_inference_steps,
        "strength": planned.request.strength,
        "eta": float(eta),
        "guidance_scale": planned.guidance_scale,
        "guided_rows": [planned.guided_rows.start, planned.guided_rows.stop],
        "unet_inputs": {name: array[0].tolist() for name, array in planned.unet_inputs.items()},
        "init_noise_scale": float(table.init_noise_scale),
        "timesteps": table.timesteps.tolist(),
        "pred_sample": table.pred_sample.tolist(),
        "pred_output": table.pred_output.tolist(),
        "coef_sample": table.coef_sample.tolist(),
        "coef_history": table.coef_history.tolist(),
        "coef_noise": table.coef_noise.sum(axis=1).tolist(),
        "draws_noise": table.draws_noise.tolist(),
        "alpha": table.alpha.tolist(),
        "sigma": table.sigma.tolist(),
        "noised_alpha": table.noised_alpha.tolist(),
        "noised_sigma": table.noised_sigma.tolist(),
    }
