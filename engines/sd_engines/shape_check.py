"""Whether the shapes that `bundle.json` lists go together, so that every tensor fits its place.

Tensors are called the same in every family of models. Only what follows from the rest of the
manifest is checked: not how wide a prompt's embeddings are, but that the UNet takes as wide ones.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

from sd_engines.node import wrong
from sd_engines.spec import (
    BATCH,
    CONTROLNET,
    DEPTH,
    IMAGE_LATENTS,
    LOW_RES_IMAGE,
    LOW_RES_LATENTS,
    NOISE_LEVEL,
    TEXT_ENCODERS,
    TIME_IDS,
)

if TYPE_CHECKING:
    from sd_engines.entries import ComponentEntry
    from sd_engines.manifest import SizeEntry
    from sd_engines.spec import ModelSpec, Profile

_Shapes: TypeAlias = dict[str, tuple[int | str, ...]]
"""By a tensor's name all axes but the first, which says what rows there are."""
_VAE = ("vae_decoder", "vae_encoder", "preview_decoder")
_MIN_PROMPT_TOKENS = 3
"""One between where a prompt begins and where it ends."""


def check_shapes(model: ModelSpec, size: SizeEntry, where: str) -> None:
    """`BundleError` names the tensor of ``size``, which is at ``where``, that has another shape."""
    if model.max_prompt_tokens < _MIN_PROMPT_TOKENS and {*TEXT_ENCODERS} & {*size.components}:
        problem = f"must be at least {_MIN_PROMPT_TOKENS} where there is a text encoder"
        raise wrong("model.max_prompt_tokens", problem)
    shapes = _handed_on(size) | _fixed(model, size.profile) | _prompt(model, size)
    for name, component in size.components.items():
        own = shapes | _own(name, component, model, size.profile)
        for border, specs in (("inputs", component.inputs), ("outputs", component.outputs)):
            for index, spec in enumerate(specs):
                expected = own.get(spec.name, spec.shape[1:])
                if not spec.shape or spec.shape[1:] != expected:
                    at = ".".join(filter(None, (where, "components", name, f"{border}[{index}]")))
                    raise wrong(
                        f"{at}.shape",
                        f"is {[*spec.shape]}; the rest of the manifest says "
                        f"{[*(spec.shape[:1] or [BATCH]), *expected]}",
                    )


def _handed_on(size: SizeEntry) -> _Shapes:
    """What one component gives and others take, but a VAE's, which may be of a tile."""
    components = (size.components[name] for name in size.components if name not in _VAE)
    return {spec.name: spec.shape[1:] for entry in components for spec in entry.outputs}


def _fixed(model: ModelSpec, profile: Profile) -> _Shapes:
    sides = height, width = profile.latent_height, profile.latent_width
    latents = (model.latent_channels, *sides)
    return {
        **dict.fromkeys(("sample", "noise_pred", "masked_image_latents", IMAGE_LATENTS), latents),
        **dict.fromkeys(("mask", "depth_mask"), (1, *sides)),
        **dict.fromkeys(("timestep", NOISE_LEVEL, "nsfw_content_detected"), ()),
        LOW_RES_IMAGE: (3, *sides),
        LOW_RES_LATENTS: (model.latent_channels, height // 2, width // 2),
        TIME_IDS: (5 if model.requires_aesthetics_score else 6,),
        "control_image": (profile.height, profile.width, 3),
        "input_ids": (model.max_prompt_tokens,),
    }


def _prompt(model: ModelSpec, size: SizeEntry) -> _Shapes:
    """What the UNet reads: whole chunks of tokens, and of each what all its encoders gave."""
    encoders = [name for name in TEXT_ENCODERS if name in size.components] or ["image_encoder"]
    widths = [
        spec.shape[-1]
        for name in encoders
        if name in size.components
        for spec in size.components[name].outputs
        if spec.name in ("prompt_embeds", "image_embeds") and len(spec.shape) == 3
    ]
    unet = size.components.get("unet")
    for spec in unet.inputs if unet else ():
        if spec.name == "encoder_hidden_states":
            tokens, width = spec.shape[1:] if len(spec.shape) == 3 else (0, 0)
            chunks = max(1, int(tokens) // model.max_prompt_tokens)
            wide = sum(map(int, widths)) if widths else width
            return {spec.name: (chunks * model.max_prompt_tokens, wide)}
    return {}


def _own(name: str, component: ComponentEntry, model: ModelSpec, profile: Profile) -> _Shapes:
    """Shapes of what is called alike elsewhere and is another thing, or of another size, here."""
    specs = {spec.name: spec for spec in chain(component.inputs, component.outputs)}
    if name in TEXT_ENCODERS and "prompt_embeds" in specs:
        return {"prompt_embeds": (model.max_prompt_tokens, *specs["prompt_embeds"].shape[2:3])}
    if name in ("safety_checker", "depth_estimator"):
        return {"images": (profile.height, profile.width, 3)}
    if name.startswith(CONTROLNET):
        return {"conditioning_scale": (len(component.outputs),)}
    if name not in _VAE or "latents" not in specs:
        return {}
    whole, tile = (profile.latent_height, profile.latent_width), specs["latents"].shape[2:4]
    sides = [min(map(int, pair)) for pair in zip(tile, whole, strict=False)]
    latents = (model.latent_channels, *sides)
    pixels = [side * profile.vae_scale_factor for side in sides]
    channels = specs[DEPTH].shape[3:4] if DEPTH in specs else ()
    return {
        "latents": latents,
        "latents_std": latents,
        "images": (*pixels, 3),
        DEPTH: (*pixels, *channels),
    }
