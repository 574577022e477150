"""Where models lie in a checkpoint of one file, and how many blocks they have.

Each lies under a prefix, and the EMA copy of the UNet under another, with its dots removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_export.open_clip import open_clip_prefix

if TYPE_CHECKING:
    from sd_export.weights import Weights

UNET_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."
VAE_PREFIX = "first_stage_model."
TEXT_ENCODER_PREFIX = "cond_stage_model.transformer."
XL_PREFIXES = {
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
XL_REFINER_PREFIXES = {"text_encoder_2": "conditioner.embedders.0.model."}
POOLED_AND_SIZES = f"{UNET_PREFIX}label_emb.0.0.weight"
"""A weight that only UNets of Stable Diffusion XL have."""


def text_encoder_prefixes(weights: Weights) -> dict[str, str]:
    """What the names of each text encoder start with in this file."""
    if POOLED_AND_SIZES in weights:
        base = any(name.startswith(XL_PREFIXES["text_encoder_2"]) for name in weights)
        return XL_PREFIXES if base else XL_REFINER_PREFIXES
    return {"text_encoder": open_clip_prefix(weights) or TEXT_ENCODER_PREFIX}


def has_ema(weights: Weights) -> bool:
    """Whether the file has the averaged copy of every weight of its UNet."""
    return all(ema_name(name) in weights for name in names_under(weights, UNET_PREFIX))


def ema_name(name: str) -> str:
    """Where the averaged copy of a weight lies."""
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def names_under(weights: Weights, prefix: str) -> list[str]:
    """Names in the file that start with ``prefix``."""
    return [name for name in weights if name.startswith(prefix)]


def vae_prefix(weights: Weights) -> str:
    """What the names of the VAE start with: nothing, in a file of a VAE alone."""
    return VAE_PREFIX if names_under(weights, VAE_PREFIX) else ""


def unet_levels(weights: Weights) -> int:
    """How many sizes the UNet works at."""
    return 1 + sum(name.endswith(".0.op.weight") for name in names_under(weights, UNET_PREFIX))


def unet_layers(weights: Weights) -> int:
    """How many blocks it has at each, on its way down."""
    return weights.count(UNET_PREFIX + "input_blocks.") // unet_levels(weights) - 1
