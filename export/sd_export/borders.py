"""What goes into the graph of a component and what comes out of it, as data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from sd_engines.spec import (
    BATCH,
    CONTROL_EMBEDDING,
    DEPTH,
    IMAGE_LATENTS,
    LOW_RES_IMAGE,
    LOW_RES_LATENTS,
    NOISE_LEVEL,
    PICTURES,
    POOLED_PROMPT_EMBEDS,
    TEXT_ENCODERS,
    TIME_IDS,
    TIMESTEP_COND,
    TensorSpec,
)
from sd_export.controlnet import residual_specs
from sd_export.family import is_xl, num_time_ids
from sd_export.image_encoder import picture_size
from sd_export.kind import Kind
from sd_export.shallow_unet import reads_text
from sd_runtime.task import DEPTH_ESTIMATOR, DEPTH_MASK, IMAGE_ENCODER

if TYPE_CHECKING:
    from sd_engines.spec import Profile
    from sd_export.checkpoint import Checkpoint

Borders: TypeAlias = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
"""Inputs and outputs."""


def borders(
    component: str, *, checkpoint: Checkpoint, profile: Profile, feature_cache: bool = False
) -> Borders:
    """Inputs and outputs of ``component`` for ``profile``, as `sd_export.wrappers.wrap` makes it.

    With ``feature_cache`` the UNet gives its deep features as well.
    """
    if component in TEXT_ENCODERS:
        return _text_borders(component, checkpoint)
    if component in ("unet", "unet_shallow", *checkpoint.controlnets):
        return _unet_borders(component, checkpoint, profile, feature_cache=feature_cache)
    latents = _latents(checkpoint, profile)
    images = TensorSpec("images", "float32", (BATCH, profile.height, profile.width, 3))
    if component == IMAGE_ENCODER:
        size = picture_size(checkpoint.configs["feature_extractor"])
        width = int(checkpoint.configs["unet"]["cross_attention_dim"])
        embeds_shape = (BATCH, checkpoint.max_prompt_tokens, width)
        squares = TensorSpec("images", "float32", (BATCH, size, size, 3))
        return (squares,), (TensorSpec("image_embeds", "float32", embeds_shape),)
    if component == DEPTH_ESTIMATOR:
        return (images,), (TensorSpec(DEPTH_MASK, "float32", (BATCH, 1, *latents.shape[2:])),)
    if component.startswith(CONTROL_EMBEDDING):
        embeds = replace(_features(checkpoint, profile), name="control_embeds")
        return (replace(images, name="control_image"),), (embeds,)
    depth = replace(images, name=DEPTH, shape=(*images.shape[:3], checkpoint.depth_channels))
    if component == "vae_decoder" and checkpoint.depth_channels:
        return (latents,), (images, depth)
    if component in ("vae_decoder", "preview_decoder"):
        return (latents,), (images,)
    if component == "vae_encoder":
        if checkpoint.kind is Kind.X2_UPSCALER:
            images, latents = (_halved(spec) for spec in (images, latents))
        seen = (images, depth) if checkpoint.kind is Kind.LDM3D_UPSCALER else (images,)
        return seen, (latents, replace(latents, name="latents_std"))
    return (images,), (TensorSpec("nsfw_content_detected", "bool", (BATCH,)),)


def rows_share(checkpoint: Checkpoint) -> bool:
    """Whether all that the UNet sees but the prompt is the same for a picture's rows.

    Stable Diffusion XL tells its timestep's embedding of the prompt, and so every layer but the
    first, and so does a latent upscaler; a model that was distilled with its guidance has one row a
    picture.
    """
    tells_prompt = is_xl(checkpoint.configs) or checkpoint.kind is Kind.X2_UPSCALER
    return not (tells_prompt or checkpoint.configs["unet"].get("time_cond_proj_dim"))


def _text_borders(component: str, checkpoint: Checkpoint) -> Borders:
    text = checkpoint.configs[component]
    tokens, width = int(text.get("max_position_embeddings", 77)), int(text["hidden_size"])
    ids = TensorSpec("input_ids", "int64", (BATCH, tokens))
    prompt_embeds = TensorSpec("prompt_embeds", "float32", (BATCH, tokens, width))
    pools = component != "text_encoder" or checkpoint.kind is Kind.X2_UPSCALER
    return (ids,), (prompt_embeds, _pooled(checkpoint)) if pools else (prompt_embeds,)


def _unet_borders(
    component: str, checkpoint: Checkpoint, profile: Profile, *, feature_cache: bool
) -> Borders:
    """Of the UNet, the shallow one, or a ControlNet, which see the same sample."""
    unet = checkpoint.configs["unet"]
    latents, features = _latents(checkpoint, profile), _features(checkpoint, profile)
    residuals = residual_specs(unet, profile=profile) if checkpoint.controlnets else ()
    axis = PICTURES if rows_share(checkpoint) else BATCH
    sample_shape = (axis, *latents.shape[1:])
    sample = TensorSpec("sample", "float32", sample_shape)
    timestep = TensorSpec("timestep", "float32", (axis,))
    tokens = checkpoint.max_prompt_tokens * checkpoint.max_prompt_chunks
    embeds_shape = (BATCH, tokens, int(unet["cross_attention_dim"]))
    embeds = TensorSpec("encoder_hidden_states", "float32", embeds_shape)
    noise_pred = replace(latents, name="noise_pred")
    added = _added(checkpoint)
    if component == "unet_shallow":
        prompt = (embeds,) if reads_text(unet) else ()
        return (sample, timestep, features, *prompt, *added), (noise_pred,)
    inputs = [sample, timestep, embeds]
    if component in checkpoint.controlnets:
        scales = TensorSpec("conditioning_scale", "float32", (BATCH, len(residuals)))
        control_embeds = TensorSpec("control_embeds", "float32", (axis, *features.shape[1:]))
        return (*inputs, *added, control_embeds, scales), residuals
    inputs += _task_inputs(checkpoint, sample)
    if checkpoint.kind is not Kind.X2_UPSCALER and unet.get("time_cond_proj_dim"):
        cond_shape = (BATCH, int(unet["time_cond_proj_dim"]))
        inputs.append(TensorSpec(TIMESTEP_COND, "float32", cond_shape))
    outputs = (noise_pred, features) if feature_cache else (noise_pred,)
    return (*inputs, *added, *residuals), outputs


def _task_inputs(checkpoint: Checkpoint, sample: TensorSpec) -> tuple[TensorSpec, ...]:
    """What the UNet of a kind sees beside the ``sample``, the timestep and the prompt."""
    axis, channels, *size = sample.shape

    def beside(name: str, channels: str | int) -> TensorSpec:
        return TensorSpec(name, "float32", (axis, channels, *size))

    match checkpoint.kind:
        case Kind.INPAINTING:
            return beside("mask", 1), beside("masked_image_latents", channels)
        case Kind.DEPTH:
            return (beside(DEPTH_MASK, 1),)
        case Kind.X4_UPSCALER:
            return beside(LOW_RES_IMAGE, 3), TensorSpec(NOISE_LEVEL, "int64", (axis,))
        case Kind.X2_UPSCALER:
            return _halved(beside(LOW_RES_LATENTS, channels)), _pooled(checkpoint)
        case Kind.LDM3D_UPSCALER:
            labels = checkpoint.configs["unet"].get("num_class_embeds")
            level = (TensorSpec(NOISE_LEVEL, "int64", (axis,)),) if labels else ()
            return (beside(IMAGE_LATENTS, channels), *level)
        case _:
            return ()


def _latents(checkpoint: Checkpoint, profile: Profile) -> TensorSpec:
    size = (profile.latent_height, profile.latent_width)
    return TensorSpec("latents", "float32", (BATCH, checkpoint.latent_channels, *size))


def _features(checkpoint: Checkpoint, profile: Profile) -> TensorSpec:
    """What a UNet's first convolution makes of its sample, and what it has before its last."""
    channels = int(checkpoint.configs["unet"]["block_out_channels"][0])
    size = (profile.latent_height, profile.latent_width)
    return TensorSpec("deep_features", "float32", (BATCH, channels, *size))


def _added(checkpoint: Checkpoint) -> tuple[TensorSpec, ...]:
    """What a UNet of Stable Diffusion XL takes besides, and whatever is made like it."""
    if not is_xl(checkpoint.configs):
        return ()
    ids_shape = (BATCH, int(num_time_ids(checkpoint.configs)))
    return (_pooled(checkpoint), TensorSpec(TIME_IDS, "float32", ids_shape))


def _pooled(checkpoint: Checkpoint) -> TensorSpec:
    width = checkpoint.configs.get("text_encoder_2", {}).get("projection_dim", 0)
    if checkpoint.kind is Kind.X2_UPSCALER:
        width = checkpoint.configs["unet"]["cross_attention_dim"]
    return TensorSpec(POOLED_PROMPT_EMBEDS, "float32", (BATCH, int(width)))


def _halved(spec: TensorSpec) -> TensorSpec:
    """``spec`` of a picture, or its latents, of half the height and width."""
    sides = (1, 2) if spec.name == "images" else (2, 3)
    shape = (int(n) // 2 if axis in sides else n for axis, n in enumerate(spec.shape))
    return replace(spec, shape=tuple(shape))
