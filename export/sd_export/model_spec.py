"""What a bundle says of the model that it was made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_engines.spec import ModelSpec

if TYPE_CHECKING:
    from sd_export.checkpoint import Checkpoint


def model_spec(checkpoint: Checkpoint) -> ModelSpec:
    """As the manifest holds it."""
    from sd_export.wrappers import vae_scaling_factor

    low_res_scheduler = checkpoint.configs.get("low_res_scheduler")
    return ModelSpec(
        source=checkpoint.source,
        revision=checkpoint.revision,
        family=checkpoint.family,
        license=checkpoint.license,
        prediction_type=checkpoint.prediction_type,
        latent_channels=checkpoint.latent_channels,
        vae_scaling_factor=vae_scaling_factor(checkpoint),
        max_prompt_tokens=checkpoint.max_prompt_tokens,
        scheduler=dict(checkpoint.configs["scheduler"]),
        defaults=checkpoint.defaults,
        vae=None if checkpoint.vae is None else checkpoint.vae.source,
        force_zeros_for_empty_prompt=checkpoint.force_zeros_for_empty_prompt,
        requires_aesthetics_score=checkpoint.requires_aesthetics_score,
        low_res_scheduler=None if low_res_scheduler is None else dict(low_res_scheduler),
        max_noise_level=checkpoint.max_noise_level,
        controlnets=tuple(checkpoint.controlnets.values()),
    )
