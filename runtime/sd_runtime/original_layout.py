"""What the original layout (CompVis, later sgm) calls the parts of a UNet that diffusers renamed.

Its blocks are numbered through, whatever their kind, where diffusers counts levels and then the
layers of each. Single files are in it, and kohya's scripts train Stable Diffusion XL in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

RESNET_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
"""Parts of a resnet → diffusers' names."""
UNET_END_NAMES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
"""What lies before, beside and behind the blocks → diffusers' names."""
_ORIGINAL_RESNET_NAMES = {new: original for original, new in RESNET_NAMES.items()}
_ORIGINAL_UNET_END_NAMES = {new: original for original, new in UNET_END_NAMES.items()}


def original_unet_names(names: Collection[str]) -> dict[str, str]:
    """Original name → diffusers' of the same layer, for all ``names`` of one UNet's layers.

    What is no layer of a UNet has none.
    """
    resnets = {name.split(".")[3] for name in names if name.startswith("up_blocks.0.resnets.")}
    attending = {
        name.split(".")[1]
        for name in names
        if name.startswith("up_blocks.") and ".attentions." in name
    }
    found = {}
    for name in names:
        original = _original_name(name, per_level=len(resnets), attending=attending)
        if original is not None:
            found[original] = name
    return found


def _original_name(name: str, *, per_level: int, attending: Collection[str]) -> str | None:
    """``per_level`` blocks; ``attending`` levels upwards have attention before an upsampler."""
    if name in _ORIGINAL_UNET_END_NAMES:
        return _ORIGINAL_UNET_END_NAMES[name]
    side, *path = name.split(".")
    if side == "mid_block":  # resnet, attention, resnet
        kind, number, *rest = path
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{_part(rest)}"
    if side not in ("down_blocks", "up_blocks"):
        return None
    level, kind, number, *rest = path
    first = per_level * int(level)
    if kind == "downsamplers":
        return f"input_blocks.{first + per_level}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + per_level - 1}.{1 + (level in attending)}.conv"
    block = first + int(number)
    at = f"input_blocks.{1 + block}" if side == "down_blocks" else f"output_blocks.{block}"
    return f"{at}.{0 if kind == 'resnets' else 1}.{_part(rest)}"


def _part(path: list[str]) -> str:
    """The rest of a name, which is a resnet's or stays."""
    part = ".".join(path)
    return _ORIGINAL_RESNET_NAMES.get(part, part)
