"""ControlNets beside a checkpoint: found, and checked before anything of them is loaded.

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", ICCV 2023,
arXiv:2302.05543. A ControlNet is a component of its own, whose outputs the UNet adds to what its
skip connections carry: so it runs only where it counts, and the bundle holds one UNet. The layers
that look at the picture alone are one more component, run once a picture and not once a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ConfigError, ExportError
from sd_engines.spec import BATCH, CONTROL_EMBEDDING, CONTROLNET, MID_RESIDUAL, RESIDUAL, TensorSpec
from sd_export.config_fields import checked_config
from sd_export.family import CONTROLNET_STRENGTH, latent_channels, vae_scale_factor
from sd_export.hub import find_snapshot
from sd_export.kind import Kind
from sd_export.model_files import read_json
from sd_export.source import SINGLE_FILE_SUFFIXES, local_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from sd_engines.spec import Profile
    from sd_export.checkpoint import Checkpoint

_HINT = (
    "Name a ControlNet of the checkpoint's own kind: its Hub id, or a folder as diffusers saves it."
)
_UPSCALER = (
    "an upscaler, which is led by the picture that it makes larger",
    "Leave --controlnet out.",
)
_REFUSED: Mapping[Kind, tuple[str, str]] = {
    Kind.INPAINTING: (
        "a UNet that is made for inpainting",
        "Export the plain checkpoint with the ControlNet: its bundle inpaints too.",
    ),
    Kind.LDM3D: (
        "an LDM3D, which draws from text alone",
        "Leave --controlnet out, or export a checkpoint that paints no depth.",
    ),
    Kind.DEPTH: (
        "a UNet that is made for depth to image",
        "Export a plain checkpoint with a ControlNet that sees depth, such as "
        "lllyasviel/sd-controlnet-depth.",
    ),
    Kind.X4_UPSCALER: _UPSCALER,
    Kind.X2_UPSCALER: _UPSCALER,
    Kind.LDM3D_UPSCALER: _UPSCALER,
    Kind.REFINER: (
        "a refiner, which goes on with what its base model began",
        "Export the base model with the ControlNet: it leads the base model's steps.",
    ),
}
"""Checkpoints that no ControlNet leads, and what to do."""
_SAME_SHAPE = ("block_out_channels", "layers_per_block")
"""What a ControlNet copies of its UNet, and what decides the shape of its outputs.

Where it looks at the prompt does not: small ones of Stable Diffusion XL do so less often, or never.
"""
_SAME_SIZES = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
"""The same for what it is told besides the prompt, of Stable Diffusion XL."""
_UNET_DEFAULTS = {
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
}


@dataclass(frozen=True)
class FoundControlNet:
    """Where a ControlNet is from (with its commit on the Hub), and its config."""

    source: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]


def with_controlnets(
    checkpoint: Checkpoint, sources: Sequence[str], *, feature_cache: bool
) -> Checkpoint:
    """``checkpoint`` with the ControlNets that ``sources`` name, as models ``controlnet_0``, ….

    Raises `ConfigError` for a name that is none and for what cannot be had together, `ExportError`
    for what is no ControlNet, or one that was made for another UNet.
    """
    if not sources:
        return checkpoint
    if feature_cache:
        raise ConfigError(
            "--feature-cache and --controlnet do not go together: the shallow UNet has no place "
            "for what a ControlNet adds",
            "Leave one of them out, or make two bundles.",
        )
    if checkpoint.kind in _REFUSED:
        what, hint = _REFUSED[checkpoint.kind]
        raise ConfigError(f"--controlnet with {what}", hint)
    found = [find_controlnet(source) for source in sources]
    for controlnet in found:
        check_controlnet(controlnet, checkpoint.configs)
    named = {f"{CONTROLNET}{index}": controlnet for index, controlnet in enumerate(found)}
    return replace(
        checkpoint,
        configs={**checkpoint.configs, **{n: c.config for n, c in named.items()}},
        weights={**checkpoint.weights, **{n: c.weights for n, c in named.items()}},
        controlnets={name: controlnet.source for name, controlnet in named.items()},
        defaults=replace(checkpoint.defaults, strength=CONTROLNET_STRENGTH),
    )


def find_controlnet(source: str) -> FoundControlNet:
    """The ControlNet that ``source`` names: a folder on this disk, else an id on the Hub."""
    path = local_path(source, hint=_HINT)
    if path is not None and path.is_file():
        what = "is one file" if path.suffix in SINGLE_FILE_SUFFIXES else "is no folder"
        raise ConfigError(f"--controlnet {source} {what}", _HINT)
    found = find_snapshot(source, path)
    stated = read_json(found.folder / "config.json", component="controlnet")
    config = checked_config("controlnet", stated)
    kind = config.get("_class_name", "ControlNetModel")
    if kind != "ControlNetModel":
        raise _error(f"{source} is a {kind}, not a ControlNetModel")
    name = source if found.commit is None else f"{source}@{found.commit}"
    return FoundControlNet(name, config, found.fetch_weights(found.folder, "controlnet"))


def check_controlnet(controlnet: FoundControlNet, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """`ExportError` that says why ``controlnet`` does not fit the checkpoint of ``configs``."""
    config, unet, vae = controlnet.config, configs["unet"], configs["vae"]
    width, hint_channels = (
        config.get("cross_attention_dim", 1280),
        config.get("conditioning_embedding_out_channels", (16, 32, 96, 256)),
    )
    factor, vae_factor = map(vae_scale_factor, (hint_channels, vae["block_out_channels"]))
    added, unet_added = (c.get("addition_embed_type") for c in (config, unet))
    differing = [
        name
        for name in (*_SAME_SHAPE, *(_SAME_SIZES if added else ()))
        if _listed(config.get(name, _UNET_DEFAULTS.get(name)))
        != _listed(unet.get(name, _UNET_DEFAULTS.get(name)))
    ]
    problem = None
    if added not in (None, "text_time") or config.get("encoder_hid_dim_type"):
        problem = "it takes further conditioning (one for Kandinsky)"
    elif added != unet_added:
        one, other = ("XL", "v1 or v2") if added else ("v1 or v2", "XL")
        problem = f"it is for Stable Diffusion {one}, the checkpoint is of {other}"
    elif config.get("class_embed_type") or config.get("num_class_embeds"):
        problem = "it takes class labels"
    elif config.get("global_pool_conditions"):
        problem = "it pools its outputs (the one for shuffled pictures), which is not supported"
    elif width != unet["cross_attention_dim"]:
        problem = (
            f"it takes prompts of width {width}, the checkpoint's are of "
            f"{unet['cross_attention_dim']} (768 in Stable Diffusion v1, 1024 in v2, 2048 in XL)"
        )
    elif differing:
        name = differing[0]
        found, wanted = (c.get(name, _UNET_DEFAULTS.get(name)) for c in (config, unet))
        problem = f"its {name} are {found}, the UNet's {wanted}"
    elif (channels := config.get("in_channels", 4)) != latent_channels(vae):
        problem = f"it takes {channels} channels of latents"
    elif config.get("conditioning_channels", 3) != 3:
        problem = f"its pictures have {config.get('conditioning_channels')} channels, not 3"
    elif factor != vae_factor:
        problem = (
            f"it makes one latent of {factor}×{factor} pixels, the VAE of {vae_factor}×{vae_factor}"
        )
    if problem is not None:
        raise _error(f"{controlnet.source} does not fit the checkpoint: {problem}")


def residual_specs(unet_config: Mapping[str, Any], *, profile: Profile) -> tuple[TensorSpec, ...]:
    """What ControlNets add to the UNet of ``unet_config``: its down blocks in order, its middle."""
    channels = unet_config.get("block_out_channels", _UNET_DEFAULTS["block_out_channels"])
    layers = unet_config.get("layers_per_block", _UNET_DEFAULTS["layers_per_block"])
    counts = [layers] * len(channels) if isinstance(layers, int) else layers
    height, width = profile.latent_height, profile.latent_width
    shapes = [(channels[0], height, width)]  # conv_in's
    for level, (channel, count) in enumerate(zip(channels, counts, strict=True)):
        shapes += [(channel, height, width)] * count
        if level + 1 < len(channels):  # all levels but the last end in a half
            height, width = -(-height // 2), -(-width // 2)
            shapes.append((channel, height, width))
    names = [f"{RESIDUAL}{index}" for index in range(len(shapes))]
    specs = [
        TensorSpec(name, "float32", (BATCH, *shape))
        for name, shape in zip(names, shapes, strict=True)
    ]
    mid = TensorSpec(MID_RESIDUAL, "float32", (BATCH, channels[-1], height, width))
    return (*specs, mid)


def control_components(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The components that are made of the checkpoint's ControlNets, two of each."""
    return tuple(
        component
        for name in checkpoint.controlnets
        for component in (name, name.replace(CONTROLNET, CONTROL_EMBEDDING))
    )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _error(message: str) -> ExportError:
    return ExportError(message, _HINT, component="controlnet", stage="load")
