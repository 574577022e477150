"""Writes a diffusers checkpoint as one file in the original CompVis layout.

The other direction of `sd_export.single_file`, written from the table in diffusers' own script
`convert_diffusers_to_original_stable_diffusion.py`, so that the two can be wrong only apart.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

_UNET_ENDS = [
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("time_embed.cond_proj", "time_embedding.cond_proj"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
]
_UNET_RESNET = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("emb_layers.1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
]
_VAE_NAMES = [
    ("nin_shortcut", "conv_shortcut"),
    ("norm_out", "conv_norm_out"),
    ("mid.attn_1.", "mid_block.attentions.0."),
]
_VAE_ATTENTION = [
    ("norm.", "group_norm."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
]


_OPEN_CLIP_NAMES = [
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("final_layer_norm.", "ln_final."),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
    (".self_attn.", ".attn."),
]


def original_state(
    checkpoint: Path, *, ema: bool = False, open_clip: str | None = None
) -> dict[str, torch.Tensor]:
    """All weights under their original names.

    ``ema`` stores the UNet's weights as their average and noise in their place, as a file has
    that was saved in training. ``open_clip`` is what the names of an OpenCLIP text encoder start
    with, None: the text encoder is CLIP's own.
    """
    unet_config = json.loads((checkpoint / "unet/config.json").read_text())
    vae_config = json.loads((checkpoint / "vae/config.json").read_text())
    unet = load_file(checkpoint / "unet/diffusion_pytorch_model.safetensors")
    vae = load_file(checkpoint / "vae/diffusion_pytorch_model.safetensors")
    layers = unet_config["layers_per_block"]
    attends = ["CrossAttn" in kind for kind in unet_config["up_block_types"]]
    state = {}
    for name, tensor in unet.items():
        original = "model.diffusion_model." + _unet_name(name, attends, layers)
        if ema:
            state["model_ema." + original.removeprefix("model.").replace(".", "")] = tensor
            state[original] = torch.randn_like(tensor)
        else:
            state[original] = tensor
    for name, tensor in vae.items():
        original = _vae_name(name, len(vae_config["block_out_channels"]))
        if "attn_1" in original and original.endswith("weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # a 1×1 convolution, then
        state["first_stage_model." + original] = tensor.contiguous()
    state["betas"] = torch.linspace(0.00085, 0.012, 1000)
    if unet_config["addition_embed_type"] == "text_time":
        return state | _xl_text_encoders(checkpoint)
    bare = _text_encoder(checkpoint / "text_encoder")
    if open_clip is not None:
        return state | {open_clip + name: tensor for name, tensor in _open_clip(bare).items()}
    return state | _clip(bare, "cond_stage_model.transformer.text_model.")


def _text_encoder(folder: Path) -> dict[str, torch.Tensor]:
    text = load_file(folder / "model.safetensors")
    return {name.removeprefix("text_model."): tensor for name, tensor in text.items()}


def _clip(text: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    positions = torch.arange(77).expand(1, -1).contiguous()
    state = {prefix + name: tensor for name, tensor in text.items()}
    return {**state, prefix + "embeddings.position_ids": positions}


def _xl_text_encoders(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Those of XL: CLIP's own first where there is one, then OpenCLIP's, whole."""
    state: dict[str, torch.Tensor] = {}
    number = 0
    if (checkpoint / "text_encoder").is_dir():
        bare = _text_encoder(checkpoint / "text_encoder")
        state = _clip(bare, "conditioner.embedders.0.transformer.text_model.")
        number = 1
    second = _text_encoder(checkpoint / "text_encoder_2")
    projection = second.pop("text_projection.weight")
    parts = _open_clip(second) | {"text_projection": projection.T.contiguous()}
    return state | {
        f"conditioner.embedders.{number}.model.{name}": tensor for name, tensor in parts.items()
    }


def _open_clip(text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder as OpenCLIP names it, query, key and value in one, and all it has beside."""
    state = {}
    for name, tensor in text.items():
        if ".q_proj." in name:
            fused = [text[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            tensor = torch.cat(fused)
            name = name.replace(".q_proj.", ".in_proj_")
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for new, original in _OPEN_CLIP_NAMES:
            name = name.replace(new, original)
        state[name] = tensor
    last = [name for name in state if ".resblocks.22." in name]
    state |= {n.replace(".22.", ".23."): torch.randn_like(state[n]) for n in last}
    width = text["final_layer_norm.weight"].shape[0]
    return {**state, "text_projection": torch.randn(width, width), "logit_scale": torch.zeros(())}


def original_unet_layer(name: str) -> str:
    """What a layer of the UNet of `tiny_xl` is called: of two levels, the second with attention."""
    return _unet_name(f"{name}.weight", [True, False], 1).removesuffix(".weight")


def _unet_name(name: str, attends: list[bool], layers: int) -> str:
    """``attends`` says of each up block whether it has attention, behind which upsamplers come."""
    levels = len(attends)
    layer_map = [("middle_block.1.", "mid_block.attentions.0.")]
    layer_map += [(f"middle_block.{2 * j}.", f"mid_block.resnets.{j}.") for j in range(2)]
    for i in range(levels):
        for j in range(layers):
            at = f"input_blocks.{(layers + 1) * i + j + 1}"
            layer_map += [
                (f"{at}.0.", f"down_blocks.{i}.resnets.{j}."),
                (f"{at}.1.", f"down_blocks.{i}.attentions.{j}."),
            ]
        for j in range(layers + 1):
            at = f"output_blocks.{(layers + 1) * i + j}"
            layer_map += [
                (f"{at}.0.", f"up_blocks.{i}.resnets.{j}."),
                (f"{at}.1.", f"up_blocks.{i}.attentions.{j}."),
            ]
        layer_map += [
            (
                f"input_blocks.{(layers + 1) * (i + 1)}.0.op.",
                f"down_blocks.{i}.downsamplers.0.conv.",
            ),
            (
                f"output_blocks.{(layers + 1) * i + layers}.{2 if attends[i] else 1}.",
                f"up_blocks.{i}.upsamplers.0.",
            ),
        ]
    for original, new in _UNET_ENDS:
        if name.startswith(new + "."):
            return name.replace(new, original)
    if ".resnets." in name:
        for original, new in _UNET_RESNET:
            name = name.replace(new, original)
    for original, new in layer_map:
        if name.startswith(new):
            return name.replace(new, original)
    raise AssertionError(name)


def _vae_name(name: str, levels: int) -> str:
    for original, new in _VAE_NAMES:
        name = name.replace(new, original)
    if "attn_1" in name:
        for original, new in _VAE_ATTENTION:
            name = name.replace(f".{new}", f".{original}")
    for i in range(levels):
        for j in range(4):
            name = name.replace(
                f"encoder.down_blocks.{i}.resnets.{j}.", f"encoder.down.{i}.block.{j}."
            )
            name = name.replace(
                f"decoder.up_blocks.{i}.resnets.{j}.", f"decoder.up.{levels - 1 - i}.block.{j}."
            )
        name = name.replace(f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample.")
        name = name.replace(f"up_blocks.{i}.upsamplers.0.", f"up.{levels - 1 - i}.upsample.")
    for j in range(2):
        name = name.replace(f"mid_block.resnets.{j}.", f"mid.block_{j + 1}.")
    return name
