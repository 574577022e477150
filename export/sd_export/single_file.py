"""The configs of a checkpoint of one file in the original CompVis layout, from the file alone.

Shapes say how many levels and channels there are; what they do not say (heads, group sizes,
scaling) is the same for all of a family and ships in `configs/v1.json`, `configs/v2.json` and
`configs/xl.json`, after the folders that diffusers takes it from.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ExportError
from sd_engines.spec import TEXT_ENCODERS
from sd_export.family import check_names
from sd_export.open_clip import open_clip_prefix, open_clip_shapes, whole_open_clip_shapes
from sd_export.single_file_layout import (
    POOLED_AND_SIZES,
    TEXT_ENCODER_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    names_under,
    text_encoder_prefixes,
    unet_layers,
    unet_levels,
    vae_prefix,
)

if TYPE_CHECKING:
    from sd_export.weights import Weights

_HEAD_SIZE = 64
_STATED_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
"""The words of ModelSpec, which trainers write into a safetensors header, in diffusers'."""
_V2_BASE_STEP = "875000"
"""Training steps of 512-base-ema.ckpt, by which diffusers too knows that it predicts epsilon."""


def single_file_configs(
    weights: Weights, *, prediction_type: str | None
) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Configs of ``unet``, ``vae``, ``scheduler`` and text encoders, in diffusers' words.

    And, in words for people, what had to be assumed. Raises `ExportError` where the file is
    another family's or lacks a part.
    """
    check_names(weights)
    encoders = text_encoder_prefixes(weights)
    parts = [("UNet", UNET_PREFIX), ("VAE", VAE_PREFIX)]
    for part, prefix in [*parts, *(("text encoder", prefix) for prefix in encoders.values())]:
        if not any(name.startswith(prefix) for name in weights):
            raise _error(
                f"no {part} in the file (no name starts with {prefix!r})",
                "Name a complete Stable Diffusion checkpoint; a VAE or a UNet alone is not one.",
            )
    xl = POOLED_AND_SIZES in weights
    open_clip = not xl and encoders["text_encoder"] != TEXT_ENCODER_PREFIX
    family = "xl" if xl else "v2" if open_clip else "v1"
    text = resources.files("sd_export").joinpath(f"configs/{family}.json").read_text()
    configs: dict[str, dict[str, Any]] = json.loads(text)
    unet, scheduler = configs["unet"], configs["scheduler"]
    try:
        unet |= _unet_shapes(weights)
        configs["vae"] |= _vae_shapes(weights)
        for encoder in TEXT_ENCODERS:
            if encoder in encoders:
                configs[encoder] |= _text_encoder_shapes(weights, encoder)
            else:
                configs.pop(encoder, None)
    except (KeyError, IndexError, StopIteration, ValueError) as error:
        raise _error(
            f"the file lacks a weight that Stable Diffusion {family} has: {error}",
            "Download the checkpoint again, or name one in the original layout.",
        ) from error
    if unet["time_cond_proj_dim"] is not None:
        scheduler |= {"_class_name": "LCMScheduler", "set_alpha_to_one": True}
    assumed = None
    prediction_type = prediction_type or _stated_prediction_type(weights)
    if prediction_type is not None:
        scheduler["prediction_type"] = prediction_type
    elif open_clip:
        assumed = "v_prediction is assumed, the file does not say; or give --prediction-type"
    if open_clip or xl:
        unet["attention_head_dim"] = [n // _HEAD_SIZE for n in unet["block_out_channels"]]
        if (
            open_clip and scheduler["prediction_type"] == "epsilon"
        ):  # as the 512×512 models of the family
            unet["sample_size"] = 64
    return configs, assumed


def _stated_prediction_type(weights: Weights) -> str | None:
    """What the file itself says that its UNet predicts, in diffusers' word."""
    if weights.notes.get("global_step") == _V2_BASE_STEP:
        return "epsilon"
    return _STATED_PREDICTIONS.get(weights.notes.get("modelspec.prediction_type", ""))


def single_file_vae_config(weights: Weights) -> dict[str, Any] | None:
    """Config of the VAE in a file, alone or in a whole checkpoint; None where there is none."""
    if not names_under(weights, vae_prefix(weights) + "decoder.up."):
        return None
    text = resources.files("sd_export").joinpath("configs/v1.json").read_text()
    try:
        config: dict[str, Any] = json.loads(text)["vae"] | _vae_shapes(weights)
    except (KeyError, IndexError, ValueError) as error:
        raise _error(
            f"the file lacks a weight that a VAE has: {error}", "Download the file again."
        ) from error
    return config


def _unet_shapes(weights: Weights) -> dict[str, Any]:
    levels, layers = unet_levels(weights), unet_layers(weights)
    firsts = [f"{UNET_PREFIX}input_blocks.{1 + level * (layers + 1)}" for level in range(levels)]
    attends = [f"{first}.1.norm.weight" in weights for first in firsts]
    guidance = f"{UNET_PREFIX}time_embed.cond_proj.weight"
    cross = next(n for n in names_under(weights, UNET_PREFIX) if n.endswith(".attn2.to_k.weight"))
    further: dict[str, Any] = {}
    if POOLED_AND_SIZES in weights:
        places = [*firsts[:-1], firsts[-1] if attends[-1] else f"{UNET_PREFIX}middle_block"]
        further = {
            "projection_class_embeddings_input_dim": weights.shape(POOLED_AND_SIZES)[1],
            "transformer_layers_per_block": [
                weights.count(f"{place}.1.transformer_blocks.") if attend else 1
                for place, attend in zip(places, [*attends[:-1], True], strict=True)
            ],
        }
    return {
        **further,
        "in_channels": weights.shape(f"{UNET_PREFIX}input_blocks.0.0.weight")[1],
        "out_channels": weights.shape(f"{UNET_PREFIX}out.2.weight")[0],
        "layers_per_block": layers,
        "block_out_channels": [
            weights.shape(f"{first}.0.out_layers.3.weight")[0] for first in firsts
        ],
        "down_block_types": [
            "CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends
        ],
        "up_block_types": [
            "CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)
        ],
        "cross_attention_dim": weights.shape(cross)[1],
        "time_cond_proj_dim": weights.shape(guidance)[1] if guidance in weights else None,
    }


def _vae_shapes(weights: Weights) -> dict[str, Any]:
    prefix = vae_prefix(weights)
    levels = weights.count(prefix + "encoder.down.")
    return {
        "latent_channels": weights.shape(f"{prefix}post_quant_conv.weight")[0],
        "layers_per_block": weights.count(f"{prefix}encoder.down.0.block."),
        "block_out_channels": [
            weights.shape(f"{prefix}encoder.down.{level}.block.0.conv1.weight")[0]
            for level in range(levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text_encoder_shapes(weights: Weights, encoder: str) -> dict[str, Any]:
    prefix = text_encoder_prefixes(weights)[encoder]
    if encoder == "text_encoder_2":
        return whole_open_clip_shapes(weights, prefix)
    if prefix == open_clip_prefix(weights):
        return open_clip_shapes(weights, prefix)
    prefix += "text_model."
    vocab_size, hidden_size = weights.shape(f"{prefix}embeddings.token_embedding.weight")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // _HEAD_SIZE,
        "intermediate_size": weights.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": weights.count(f"{prefix}encoder.layers."),
        "max_position_embeddings": weights.shape(f"{prefix}embeddings.position_embedding.weight")[
            0
        ],
    }


def _error(message: str, hint: str) -> ExportError:
    return ExportError(message, hint, component="checkpoint", stage="load")
