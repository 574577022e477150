"""The names of a single file's weights in diffusers' words; they map one to one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sd_engines.spec import TEXT_ENCODERS
from sd_export.open_clip import open_clip_names, open_clip_prefix, whole_open_clip_names
from sd_export.single_file_layout import (
    UNET_PREFIX,
    ema_name,
    has_ema,
    names_under,
    text_encoder_prefixes,
    unet_layers,
    vae_prefix,
)
from sd_export.weights import Place
from sd_runtime.original_layout import RESNET_NAMES, UNET_END_NAMES

if TYPE_CHECKING:
    from sd_export.weights import Weights

_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""All of it that is the model's; a file of a VAE alone holds its training's loss as well."""
_UNET_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.\d+\.\w+\.")
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


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
        return {name.removeprefix(prefix): Place(name) for name in names_under(weights, prefix)}
    if component == "vae":
        prefix = vae_prefix(weights)
        levels = weights.count(prefix + "decoder.up.")
        return {
            _vae_name(n.removeprefix(prefix), levels=levels): Place(n)
            for part in _VAE_PARTS
            for n in names_under(weights, prefix + part)
        }
    layers = unet_layers(weights)
    ema = has_ema(weights)
    return {
        _unet_name(n.removeprefix(UNET_PREFIX), layers=layers): Place(ema_name(n) if ema else n)
        for n in names_under(weights, UNET_PREFIX)
    }


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
