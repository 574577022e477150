"""The torch modules that are traced: each gives its graph what `borders` lists.

Whatever belongs to a component and is the same in every program goes into its graph: the VAE's
scaling, pictures as [batch, H, W, 3] in [0, 1], the safety checker's own resizing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sd_engines.spec import (
    CONTROL_EMBEDDING,
    CONTROLNET,
    MID_RESIDUAL,
    NOISE_LEVEL,
    RESIDUAL,
    TEXT_ENCODERS,
    TIMESTEP_COND,
)
from sd_export.added_conditions import added_cond_kwargs
from sd_export.borders import borders
from sd_export.controlnet_parts import ControlEmbedding, ControlNet
from sd_export.depth_estimator import DepthEstimator
from sd_export.family import is_xl
from sd_export.image_encoder import ImageEncoder
from sd_export.kind import Kind
from sd_export.latent_upscaler import LatentUpscaler, PoolingTextEncoder
from sd_export.preview_vae import PREVIEW_VAE
from sd_export.safety_checker import SafetyChecker
from sd_export.shallow_unet import CachedUnet, ShallowUnet
from sd_runtime.task import CHANNEL_INPUTS, DEPTH_ESTIMATOR, IMAGE_ENCODER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_engines.spec import Profile
    from sd_export.checkpoint import Checkpoint

COMPONENTS = (
    "text_encoder",
    "text_encoder_2",
    IMAGE_ENCODER,
    "unet",
    "unet_shallow",
    "vae_decoder",
    "preview_decoder",
    "vae_encoder",
    DEPTH_ESTIMATOR,
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


class PenultimateTextEncoder(nn.Module):
    """input_ids int64 [batch, 77] → prompt_embeds [batch, 77, d], the last layer but one.

    With a projection, pooled_prompt_embeds [batch, e] too. Keeps no layer that it does not need.
    """

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        whole: Any = text_encoder
        self.projects = hasattr(whole, "text_projection")
        self.text_encoder = whole
        if not self.projects:
            whole.encoder.layers = whole.encoder.layers[:-1]
            whole.final_layer_norm = nn.Identity()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Encode."""
        if not self.projects:
            prompt_embeds: torch.Tensor = self.text_encoder(input_ids).last_hidden_state
            return prompt_embeds
        found: list[torch.Tensor] = []
        last_layer = self.text_encoder.text_model.encoder.layers[-1]
        hook = last_layer.register_forward_pre_hook(lambda _layer, inputs: found.append(inputs[0]))
        try:
            pooled_prompt_embeds: torch.Tensor = self.text_encoder(input_ids).text_embeds
        finally:
            hook.remove()
        return found[0], pooled_prompt_embeds


class Unet(nn.Module):
    """sample [batch, c, h, w], timestep [batch], encoder_hidden_states, … → noise_pred.

    Takes what ``names`` say, in their order: with mask [batch, 1, h, w] and masked_image_latents
    [batch, c, h, w] where it is for inpainting; with depth_mask [batch, 1, h, w] where it is for
    depth to image; with low_res_image [batch, 3, h, w] or image_latents [batch, c, h, w], and
    noise_level [batch], where it is an upscaler; with timestep_cond [batch, d] where it was
    distilled together with its guidance; with pooled_prompt_embeds [batch, e] and time_ids [batch,
    5 or 6] where it is of Stable Diffusion XL; with the residuals of ControlNets, zeros where there
    are none, the middle's last.
    """

    def __init__(self, unet: nn.Module, *, names: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self.names = tuple(names)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Predict."""
        inputs = dict(zip(self.names, tensors, strict=True))
        seen = [inputs[name] for name in CHANNEL_INPUTS if name in inputs]
        residuals = [inputs[name] for name in self.names if name.startswith(RESIDUAL)]
        noise_pred: torch.Tensor = self.unet(
            torch.cat(seen, dim=1) if len(seen) > 1 else seen[0],
            inputs["timestep"],
            inputs["encoder_hidden_states"],
            class_labels=inputs.get(NOISE_LEVEL),
            timestep_cond=inputs.get(TIMESTEP_COND),
            added_cond_kwargs=added_cond_kwargs(inputs),
            down_block_additional_residuals=tuple(residuals) or None,
            mid_block_additional_residual=inputs.get(MID_RESIDUAL),
            return_dict=False,
        )[0]
        return noise_pred


class VaeDecoder(nn.Module):
    """latents [batch, c, h, w], scaled → images [batch, H, W, 3] in [0, 1].

    With ``gives_depth`` also depth [batch, H, W, k] in [0, 1]: the channels after those of colour.
    """

    def __init__(self, vae: nn.Module, *, scaling_factor: float, gives_depth: bool = False) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scaling_factor = scaling_factor
        self.gives_depth = gives_depth

    def forward(self, latents: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Decode."""
        images: torch.Tensor = self.vae.decode(latents / self.scaling_factor, return_dict=False)[0]
        images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (images[..., :3], images[..., 3:]) if self.gives_depth else images


class VaeEncoder(nn.Module):
    """images [batch, H, W, 3] in [0, 1] → latents, latents_std [batch, c, h, w], both scaled.

    With depth [batch, H, W, 1] in [0, 1] too, where the VAE takes it.
    """

    def __init__(self, vae: nn.Module, *, scaling_factor: float) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scaling_factor = scaling_factor

    def forward(self, *seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode."""
        images = torch.cat(seen, dim=-1) if len(seen) > 1 else seen[0]
        posterior = self.vae.encode(images.permute(0, 3, 1, 2) * 2 - 1, return_dict=False)[0]
        return posterior.mean * self.scaling_factor, posterior.std * self.scaling_factor


def components_of(checkpoint: Checkpoint, *, feature_cache: bool) -> tuple[str, ...]:
    """The components that a bundle of ``checkpoint`` has, its ControlNets' aside, in their order.

    No VAE encoder where nothing begins with a picture's latents: of an LDM3D, whose would take
    depth as well, of what reads a picture in the place of a prompt, and of an upscaler that sees
    pixels.
    """
    from_noise = checkpoint.kind in (Kind.LDM3D, Kind.VARIATIONS, Kind.X4_UPSCALER)
    unwanted = {"vae_encoder": from_noise, "unet_shallow": not feature_cache}
    return tuple(
        component
        for component in COMPONENTS
        if model_of(component) in checkpoint.weights and not unwanted.get(component, False)
    )


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
    inputs, _ = borders(component, checkpoint=checkpoint, profile=profile)
    names = [spec.name for spec in inputs]
    wrapper: nn.Module
    if component in TEXT_ENCODERS:
        if checkpoint.kind is Kind.X2_UPSCALER:
            wrapper = PoolingTextEncoder(model)
        elif is_xl(checkpoint.configs):
            wrapper = PenultimateTextEncoder(model)
        else:
            wrapper = TextEncoder(model)
    elif component == "unet" and checkpoint.kind is Kind.X2_UPSCALER:
        wrapper = LatentUpscaler(model)
    elif component == "unet":
        wrapper = Unet(model, names=names)
        wrapper = CachedUnet(wrapper) if feature_cache else wrapper
    elif component in checkpoint.controlnets:
        wrapper = ControlNet(model, names=names)
    elif component.startswith(CONTROL_EMBEDDING):
        wrapper = ControlEmbedding(model)
    elif component == "unet_shallow":
        wrapper = ShallowUnet(model, names=names)
    elif component == "preview_decoder":
        own = float(checkpoint.configs[PREVIEW_VAE].get("scaling_factor", 1.0))
        wrapper = VaeDecoder(model, scaling_factor=own)
    elif component == "vae_decoder":
        gives_depth = checkpoint.depth_channels > 0
        wrapper = VaeDecoder(model, scaling_factor=scaling_factor, gives_depth=gives_depth)
    elif component == "vae_encoder":
        wrapper = VaeEncoder(model, scaling_factor=scaling_factor)
    else:
        processor = checkpoint.configs["feature_extractor"]
        if component == DEPTH_ESTIMATOR:
            wrapper = DepthEstimator(model, processor=processor, profile=profile)
        elif component == IMAGE_ENCODER:
            wrapper = ImageEncoder(model, processor=processor)
        else:
            wrapper = SafetyChecker(
                model, processor=processor, height=profile.height, width=profile.width
            )
    return wrapper.eval()


def vae_scaling_factor(checkpoint: Checkpoint) -> float:
    """What the VAE's latents are multiplied by; diffusers' default where the config is silent."""
    return float(checkpoint.configs["vae"].get("scaling_factor", 0.18215))
