"""Reads checkpoints of one file in the original CompVis layout, from the file alone.

Models lie in one file under a prefix each, and the EMA copy of the UNet under another, with its
dots removed. Names map one to one onto diffusers' names; shapes say how many levels and channels
there are; what neither says (heads, group sizes, scaling) is the same for all of a family and ships
in `configs/v1.json`, `configs/v2.json` and `configs/xl.json`, after the folders that diffusers
takes it from.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ExportError
from sd_engines.spec import TEXT_ENCODERS
from sd_export.family import check_names
from sd_export.open_clip import (
    open_clip_names,
    open_clip_prefix,
    open_clip_shapes,
    whole_open_clip_names,
    whole_open_clip_shapes,
)
from sd_export.weights import Place
from sd_runtime.original_layout import RESNET_NAMES, UNET_END_NAMES

if TYPE_CHECKING:
    from sd_export.weights import Weights

UNET_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."
VAE_PREFIX = "first_stage_model."
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""All of it that is the model's; a file of a VAE alone holds its training's loss as well."""
TEXT_ENCODER_PREFIX = "cond_stage_model.transformer."
XL_PREFIXES = {
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
XL_REFINER_PREFIXES = {"text_encoder_2": "conditioner.embedders.0.model."}
_POOLED_AND_SIZES = f"{UNET_PREFIX}label_emb.0.0.weight"
"""A weight that only UNets of Stable Diffusion XL have."""
_HEAD_SIZE = 64

_UNET_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.\d+\.\w+\.")
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
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
    xl = _POOLED_AND_SIZES in weights
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
    if not _under(weights, _vae_prefix(weights) + "decoder.up."):
        return None
    text = resources.files("sd_export").joinpath("configs/v1.json").read_text()
    try:
        config: dict[str, Any] = json.loads(text)["vae"] | _vae_shapes(weights)
    except (KeyError, IndexError, ValueError) as error:
        raise _error(
            f"the file lacks a weight that a VAE has: {error}", "Download the file again."
        ) from error
    return config


def single_file_names(weights: Weights, component: str) -> dict[str, Place]:
    """Where each of the component's weights lies, by diffusers' names.

    ``component`` is ``unet`` (its EMA copy where the file has one), ``vae`` or a text encoder.
    """
    if component in TEXT_ENCODERS:
        prefix = text_encoder_prefixes(weights)[component]
        if component == "text_encoder_2":
            return whole_open_clip_names(weights, prefix)
        if prefix == open_clip_prefix(weights):
            return open_clip_names(weights, prefix)
        return {name.removeprefix(prefix): Place(name) for name in _under(weights, prefix)}
    if component == "vae":
        prefix = _vae_prefix(weights)
        levels = weights.count(prefix + "decoder.up.")
        return {
            _vae_name(n.removeprefix(prefix), levels=levels): Place(n)
            for part in _VAE_PARTS
            for n in _under(weights, prefix + part)
        }
    layers = _unet_layers(weights)
    ema = has_ema(weights)
    return {
        _unet_name(n.removeprefix(UNET_PREFIX), layers=layers): Place(_ema_name(n) if ema else n)
        for n in _under(weights, UNET_PREFIX)
    }


def text_encoder_prefixes(weights: Weights) -> dict[str, str]:
    """What the names of each text encoder start with in this file."""
    if _POOLED_AND_SIZES in weights:
        base = any(name.startswith(XL_PREFIXES["text_encoder_2"]) for name in weights)
        return XL_PREFIXES if base else XL_REFINER_PREFIXES
    return {"text_encoder": open_clip_prefix(weights) or TEXT_ENCODER_PREFIX}


def has_ema(weights: Weights) -> bool:
    """Whether the file has the averaged copy of every weight of its UNet."""
    return all(_ema_name(name) in weights for name in _under(weights, UNET_PREFIX))


def _ema_name(name: str) -> str:
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def _under(weights: Weights, prefix: str) -> list[str]:
    return [name for name in weights if name.startswith(prefix)]


def _vae_prefix(weights: Weights) -> str:
    """What the names of the VAE start with: nothing, in a file of a VAE alone."""
    return VAE_PREFIX if _under(weights, VAE_PREFIX) else ""


def _unet_levels(weights: Weights) -> int:
    return 1 + sum(name.endswith(".0.op.weight") for name in _under(weights, UNET_PREFIX))


def _unet_layers(weights: Weights) -> int:
    return weights.count(UNET_PREFIX + "input_blocks.") // _unet_levels(weights) - 1


def _unet_name(name: str, *, layers: int) -> str:
    for old, new in UNET_END_NAMES.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    if not _UNET_BLOCK.match(name):
        return name  # of no such model: it is named when the weights are assigned
    side, number, rest = name.split(".", 2)
    block = int(number)
    if side == "middle_block":  # resnet, attention, resnet
        kind = "attentions.0" if block == 1 else f"resnets.{block // 2}"
        return f"mid_block.{kind}.{_resnet_name(rest)}"
    part, rest = rest.split(".", 1)
    level, layer = divmod(block - (side == "input_blocks"), layers + 1)
    home = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
    if rest.startswith("op."):
        return f"{home}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
        return f"{home}.upsamplers.0.{rest}"
    return f"{home}.{'resnets' if part == '0' else 'attentions'}.{layer}.{_resnet_name(rest)}"


def _resnet_name(name: str) -> str:
    for old, new in RESNET_NAMES.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def _vae_name(name: str, *, levels: int) -> str:
    name = name.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
    name = re.sub(r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}", name)
    name = re.sub(
        r"\.mid\.attn_1\.(\w+)", lambda m: f".mid_block.attentions.0.{_VAE_ATTENTION[m[1]]}", name
    )
    name = re.sub(r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets.", name)
    name = re.sub(r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0.", name)
    return re.sub(
        r"\.up\.(\d)\.(block|upsample)\.",  # CompVis counts the decoder's levels from the output
        lambda m: (
            f".up_blocks.{levels - 1 - int(m[1])}."
            + ("resnets." if m[2] == "block" else "upsamplers.0.")
        ),
        name,
    )


def _unet_shapes(weights: Weights) -> dict[str, Any]:
    levels, layers = _unet_levels(weights), _unet_layers(weights)
    firsts = [f"{UNET_PREFIX}input_blocks.{1 + level * (layers + 1)}" for level in range(levels)]
    attends = [f"{first}.1.norm.weight" in weights for first in firsts]
    guidance = f"{UNET_PREFIX}time_embed.cond_proj.weight"
    cross = next(n for n in _under(weights, UNET_PREFIX) if n.endswith(".attn2.to_k.weight"))
    further: dict[str, Any] = {}
    if _POOLED_AND_SIZES in weights:
        places = [*firsts[:-1], firsts[-1] if attends[-1] else f"{UNET_PREFIX}middle_block"]
        further = {
            "projection_class_embeddings_input_dim": weights.shape(_POOLED_AND_SIZES)[1],
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
    prefix = _vae_prefix(weights)
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
