"""The torch modules that are traced: each gives its graph the border of DESIGN §4.

Whatever belongs to a component and is the same in every program goes into its graph: the VAE's
scaling, pictures as [batch, H, W, 3] in [0, 1], the safety checker's own resizing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sd_engines.spec import (
    BATCH,
    CONTROL_EMBEDDING,
    CONTROLNET,
    TIMESTEP_COND,
    TensorSpec,
)
from sd_export.controlled_unet import ControlEmbedding, ControlledUnet, ControlNet
from sd_export.controlnet import residual_specs
from sd_export.preview_vae import PREVIEW_VAE
from sd_export.safety_checker import SafetyChecker
from sd_export.shallow_unet import CachedUnet, ShallowUnet, reads_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_engines.spec import Profile
    from sd_export.source import Checkpoint

COMPONENTS = (
    "text_encoder",
    "unet",
    "unet_shallow",
    "vae_decoder",
    "preview_decoder",
    "vae_encoder",
    "safety_checker",
)
"""Components of a bundle, in the order in which they are made; its ControlNets come after them."""
MODEL_OF = {
    "unet_shallow": "unet",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
    "preview_decoder": PREVIEW_VAE,
}
"""The checkpoint's model that holds a component, where its name differs."""


class TextEncoder(nn.Module):
    """input_ids int64 [batch, 77] → prompt_embeds [batch, 77, d], the last layer, normalised."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Encode."""
        prompt_embeds: torch.Tensor = self.text_encoder(input_ids).last_hidden_state
        return prompt_embeds


class Unet(nn.Module):
    """sample [batch, c, h, w], timestep [batch], encoder_hidden_states → noise_pred.

    With timestep_cond [batch, d] where the UNet was distilled together with its guidance, and
    with the ``residuals`` of ControlNets, the middle's last.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
        *,
        residuals: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Predict."""
        noise_pred: torch.Tensor = self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            down_block_additional_residuals=tuple(residuals[:-1]) if residuals else None,
            mid_block_additional_residual=residuals[-1] if residuals else None,
            return_dict=False,
        )[0]
        return noise_pred


class InpaintingUnet(nn.Module):
    """As `Unet`, with mask [batch, 1, h, w] and masked_image_latents [batch, c, h, w]."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = Unet(unet)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        mask: torch.Tensor,
        masked_image_latents: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict."""
        stacked = torch.cat([sample, mask, masked_image_latents], dim=1)
        noise_pred: torch.Tensor = self.unet(
            stacked, timestep, encoder_hidden_states, timestep_cond
        )
        return noise_pred


class VaeDecoder(nn.Module):
    """latents [batch, c, h, w], scaled → images [batch, H, W, 3] in [0, 1]."""

    def __init__(self, vae: nn.Module, *, scaling_factor: float) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scaling_factor = scaling_factor

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode."""
        images: torch.Tensor = self.vae.decode(latents / self.scaling_factor, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


class VaeEncoder(nn.Module):
    """images [batch, H, W, 3] in [0, 1] → latents, latents_std [batch, c, h, w], both scaled."""

    def __init__(self, vae: nn.Module, *, scaling_factor: float) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scaling_factor = scaling_factor

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode."""
        posterior = self.vae.encode(images.permute(0, 3, 1, 2) * 2 - 1, return_dict=False)[0]
        return posterior.mean * self.scaling_factor, posterior.std * self.scaling_factor


def model_of(component: str) -> str:
    """The checkpoint's model that holds ``component``."""
    return MODEL_OF.get(component, component.replace(CONTROL_EMBEDDING, CONTROLNET))


def wrap(
    component: str,
    model: nn.Module,
    *,
    checkpoint: Checkpoint,
    profile: Profile,
    feature_cache: bool = False,
) -> nn.Module:
    """The module to trace for ``component``, around ``model`` (that of `model_of`).

    With ``feature_cache`` the UNet gives its deep features as well.
    """
    scaling_factor = vae_scaling_factor(checkpoint)
    wrapper: nn.Module
    if component == "text_encoder":
        wrapper = TextEncoder(model)
    elif component == "unet":
        if checkpoint.is_for_inpainting:
            wrapper = InpaintingUnet(model)
        else:
            wrapper = CachedUnet(model) if feature_cache else Unet(model)
        if checkpoint.controlnets:
            count = len(residual_specs(checkpoint.configs["unet"], profile=profile))
            wrapper = ControlledUnet(wrapper, num_residuals=count)
    elif component in checkpoint.controlnets:
        wrapper = ControlNet(model)
    elif component.startswith(CONTROL_EMBEDDING):
        wrapper = ControlEmbedding(model)
    elif component == "unet_shallow":
        wrapper = ShallowUnet(model)
    elif component == "preview_decoder":
        wrapper = VaeDecoder(model, scaling_factor=1.0)  # it reads them as the sampler leaves them
    elif component == "vae_decoder":
        wrapper = VaeDecoder(model, scaling_factor=scaling_factor)
    elif component == "vae_encoder":
        wrapper = VaeEncoder(model, scaling_factor=scaling_factor)
    else:
        wrapper = SafetyChecker(
            model,
            processor=checkpoint.configs["feature_extractor"],
            height=profile.height,
            width=profile.width,
        )
    return wrapper.eval()


def vae_scaling_factor(checkpoint: Checkpoint) -> float:
    """What the VAE's latents are multiplied by; diffusers' default where the config is silent."""
    return float(checkpoint.configs["vae"].get("scaling_factor", 0.18215))


def borders(
    component: str, *, checkpoint: Checkpoint, profile: Profile, feature_cache: bool = False
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of ``component`` for ``profile``, as `wrap` makes it."""
    text, unet = checkpoint.configs["text_encoder"], checkpoint.configs["unet"]
    tokens, width = int(text.get("max_position_embeddings", 77)), int(text["hidden_size"])
    latent_size = (profile.latent_height, profile.latent_width)
    latent_shape = (BATCH, checkpoint.latent_channels, *latent_size)
    embeds_shape = (BATCH, tokens, width)
    chunks_shape = (BATCH, tokens * checkpoint.max_prompt_chunks, width)
    features_shape = (BATCH, int(unet["block_out_channels"][0]), *latent_size)
    latents = TensorSpec("latents", "float32", latent_shape)
    images = TensorSpec("images", "float32", (BATCH, profile.height, profile.width, 3))
    if component == "text_encoder":
        ids = TensorSpec("input_ids", "int64", (BATCH, tokens))
        return (ids,), (TensorSpec("prompt_embeds", "float32", embeds_shape),)
    control_embeds = TensorSpec("control_embeds", "float32", features_shape)
    if component.startswith(CONTROL_EMBEDDING):
        return (replace(images, name="control_image"),), (control_embeds,)
    residuals = residual_specs(unet, profile=profile) if checkpoint.controlnets else ()
    if component in ("unet", "unet_shallow", *checkpoint.controlnets):
        sample = TensorSpec("sample", "float32", latent_shape)
        timestep = TensorSpec("timestep", "float32", (BATCH,))
        embeds = TensorSpec("encoder_hidden_states", "float32", chunks_shape)
        noise_pred = TensorSpec("noise_pred", "float32", latent_shape)
        features = TensorSpec("deep_features", "float32", features_shape)
        if component == "unet_shallow":
            prompt = (embeds,) if reads_text(unet) else ()
            return (sample, timestep, features, *prompt), (noise_pred,)
        inputs = [sample, timestep, embeds]
        if component in checkpoint.controlnets:
            scales = TensorSpec("conditioning_scale", "float32", (BATCH, len(residuals)))
            return (*inputs, control_embeds, scales), residuals
        if checkpoint.is_for_inpainting:
            inputs += [
                TensorSpec("mask", "float32", (BATCH, 1, *latent_size)),
                TensorSpec("masked_image_latents", "float32", latent_shape),
            ]
        if unet.get("time_cond_proj_dim"):
            cond_shape = (BATCH, int(unet["time_cond_proj_dim"]))
            inputs.append(TensorSpec(TIMESTEP_COND, "float32", cond_shape))
        inputs += residuals
        return tuple(inputs), (noise_pred, features) if feature_cache else (noise_pred,)
    if component in ("vae_decoder", "preview_decoder"):
        return (latents,), (images,)
    if component == "vae_encoder":
        return (images,), (latents, TensorSpec("latents_std", "float32", latent_shape))
    return (images,), (TensorSpec("nsfw_content_detected", "bool", (BATCH,)),)
