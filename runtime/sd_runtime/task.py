"""What a request asks of a bundle, as data: how its latents begin, and what holds them.

Every task runs through the same loop. Rombach et al. 2022 (arXiv:2112.10752), section 4.5, for the
UNet that is fed the mask; Lugmayr et al. 2022 (arXiv:2201.09865), section 4.1, for blending.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from sd_engines.errors import BundleError, ConfigError
from sd_engines.node import REMAKE_HINT
from sd_engines.spec import (
    DEPTH,
    IMAGE_LATENTS,
    LOW_RES_IMAGE,
    LOW_RES_LATENTS,
    NOISE_LEVEL,
    TEXT_ENCODERS,
)
from sd_runtime.request import Request

if TYPE_CHECKING:
    from sd_engines.manifest import Manifest
    from sd_engines.spec import TensorSpec

Draw: TypeAlias = Literal[
    "image",
    "noise",
    "masked_image",
    "low_res_image",
    "low_res_latents",
    "image_latents",
    "unused",
]
MASK_INPUTS = ("mask", "masked_image_latents")
"""What the UNet of an inpainting checkpoint takes besides; named so in its graph."""
DEPTH_MASK = "depth_mask"
"""What the UNet of a depth-to-image checkpoint takes besides, as diffusers calls it."""
UPSCALER_INPUTS: tuple[Draw, ...] = (LOW_RES_IMAGE, LOW_RES_LATENTS, IMAGE_LATENTS)
"""What the UNet of an upscaler takes besides, one of these: a draw, which it is shown as it is."""
CHANNEL_INPUTS = ("sample", *MASK_INPUTS, DEPTH_MASK, *UPSCALER_INPUTS)
"""All inputs that a UNet's first layer sees side by side, in this order."""
ENCODER = "vae_encoder"
DEPTH_ESTIMATOR = "depth_estimator"
IMAGE_ENCODER = "image_encoder"
"""What reads a picture in the place of a prompt, where a bundle has it and no text encoder."""
_MAKE_LARGER = (
    "Leave the picture out. The bundle of another checkpoint makes it and its depth larger: "
    "sd-export --model Intel/ldm3d-sr --output BUNDLE."
)


@dataclass(frozen=True)
class Task:
    """How pictures of one kind begin.

    ``draws`` are the random draws before the first row, in diffusers' order, all of one stream a
    picture: the first noise, or latents out of the posterior of the picture or its masked form, or
    the small picture that an upscaler is shown, its latents, or those of a picture and its depth;
    an "unused" one only moves the stream on, as diffusers does.
    ``mixes_image``: the first latents are the picture's with noise, not noise alone.
    ``feeds_mask``: the UNet takes `MASK_INPUTS`; where there is a mask and it does not, what the
    mask leaves out becomes the picture's again after every row.
    ``feeds_depth``: the UNet takes `DEPTH_MASK`.
    ``reads_image``: the UNet reads the picture in the place of a prompt, and begins from noise.
    ``by_tiles``: the picture may have any size, and is drawn by tiles of the bundle's.
    """

    name: str
    draws: tuple[Draw, ...]
    mixes_image: bool = False
    feeds_mask: bool = False
    feeds_depth: bool = False
    reads_image: bool = False
    by_tiles: bool = False


TEXT_TO_IMAGE = Task("text-to-image", ("noise",))
IMAGE_TO_IMAGE = Task("image-to-image", ("image", "noise"), mixes_image=True)
DEPTH_TO_IMAGE = Task("depth-to-image", ("image", "noise"), mixes_image=True, feeds_depth=True)
IMAGE_VARIATION = Task("image-variation", ("noise",), reads_image=True)
REFINING = Task("refining", ())
"""Goes on where another model stopped, whose latents it takes as they are."""
UPSCALING = Task("upscaling", ("low_res_image", "noise"), by_tiles=True)
LATENT_UPSCALING = Task("upscaling", ("low_res_latents", "noise"), by_tiles=True)
DEPTH_UPSCALING = Task("upscaling", ("image_latents", "noise"))


def task_of(request: Request, manifest: Manifest) -> Task:
    """The task that ``request`` is, of a bundle.

    Raises `ConfigError` where the bundle is for another, `BundleError` where it has no VAE encoder,
    or no estimator of a depth that is not given.
    """
    if reads_image(manifest):
        _check_variation(request)
        return IMAGE_VARIATION
    if LOW_RES_IMAGE in unet_inputs(manifest):
        return UPSCALING
    if upscales(manifest):
        _check_encoder(manifest)
        return DEPTH_UPSCALING if gives_depth(manifest) else LATENT_UPSCALING
    _check_pictures(request, manifest)
    if request.image is None:
        return TEXT_TO_IMAGE
    _check_encoder(manifest)
    if takes_depth(manifest):
        if DEPTH_ESTIMATOR not in manifest.components and request.depth_map is None:
            raise BundleError(
                "the bundle has no depth_estimator, so it cannot tell the picture's depth",
                "Give it: --depth-map MAP; or make the bundle again: "
                "sd-export --model MODEL --output BUNDLE.",
            )
        return DEPTH_TO_IMAGE
    if request.mask is None:
        return IMAGE_TO_IMAGE
    strength = request.strength_or(manifest.model.defaults)
    mixes_image = strength < 1  # at 1, diffusers inpaints from noise alone
    if not takes_mask(manifest):  # diffusers draws the masked picture's latents even so
        return Task("inpainting", ("image", "noise", "unused"), mixes_image=mixes_image)
    draws: tuple[Draw, ...] = ("noise", "masked_image")
    if mixes_image:
        draws = ("image", *draws)
    return Task("inpainting", draws, mixes_image=mixes_image, feeds_mask=True)


def unet_inputs(manifest: Manifest) -> dict[str, TensorSpec]:
    """What the UNet takes, by name; nothing without one, which is refused when it is opened."""
    unet = manifest.components.get("unet")
    return {} if unet is None else {spec.name: spec for spec in unet.inputs}


def takes_mask(manifest: Manifest) -> bool:
    """Whether the bundle's UNet is an inpainting checkpoint's."""
    return unet_inputs(manifest).keys() >= set(MASK_INPUTS)


def upscales(manifest: Manifest) -> bool:
    """Whether the bundle's UNet is an upscaler's."""
    return not unet_inputs(manifest).keys().isdisjoint(UPSCALER_INPUTS)


def takes_noise_level(manifest: Manifest) -> bool:
    """Whether the bundle's UNet is told how much noise is on the picture that it makes larger."""
    return NOISE_LEVEL in unet_inputs(manifest)


def takes_depth(manifest: Manifest) -> bool:
    """Whether the bundle's UNet is a depth-to-image checkpoint's."""
    return DEPTH_MASK in unet_inputs(manifest)


def gives_depth(manifest: Manifest) -> bool:
    """Whether the bundle is an LDM3D's, which draws how far things are beside the picture."""
    decoder = manifest.components.get("vae_decoder")  # None as in `unet_inputs`
    return decoder is not None and any(spec.name == DEPTH for spec in decoder.outputs)


def reads_image(manifest: Manifest) -> bool:
    """Whether the bundle reads a picture in the place of a prompt."""
    return IMAGE_ENCODER in manifest.components and not any(
        name in manifest.components for name in TEXT_ENCODERS
    )


def tasks_of(manifest: Manifest) -> tuple[str, ...]:
    """The names of all that can be asked of a bundle."""
    if upscales(manifest):
        return (UPSCALING.name,)
    if takes_mask(manifest):
        return ("inpainting",)
    if takes_depth(manifest):
        return (DEPTH_TO_IMAGE.name,)
    if reads_image(manifest):
        return (IMAGE_VARIATION.name,)
    if ENCODER not in manifest.components:
        return (TEXT_TO_IMAGE.name,)
    begins = () if manifest.model.requires_aesthetics_score else (TEXT_TO_IMAGE.name,)
    return (*begins, IMAGE_TO_IMAGE.name, "inpainting")


def plainest_request(manifest: Manifest) -> Request:
    """The least that a bundle can be asked: nothing, of nothing, where it takes a picture."""
    if tasks_of(manifest)[0] == TEXT_TO_IMAGE.name:
        return Request("")
    import numpy as np  # not for sd-export --help

    black = np.zeros((1, 1, 3), np.uint8)
    mask = black if takes_mask(manifest) else None
    slope = np.array([[0, 1]], np.uint16)
    depth_map = slope if upscales(manifest) and gives_depth(manifest) else None
    return Request("", image=black, mask=mask, depth_map=depth_map)


def check_served(manifest: Manifest) -> None:
    """`ConfigError` for a bundle that services have no door for: an upscaler's.

    A service says how large its pictures are before it is asked; here that is the request's.
    """
    if upscales(manifest):
        raise ConfigError(
            "the bundle is an upscaler, and services have no door for one",
            "Draw with it by sd-run BUNDLE PROMPT --image PICTURE, or in Python.",
        )


def _check_variation(request: Request) -> None:
    """`ConfigError` for what is not read where a picture is, or does not begin from noise."""
    if request.image is None or any(request.prompts) or any(request.negative_prompts):
        raise ConfigError(
            "the bundle draws variations of a picture: it reads that, and no prompt",
            "Give it alone: sd-run BUNDLE --image PICTURE.",
        )
    for name, hint in (
        ("mask", "Repaint with the bundle of another checkpoint."),
        ("depth_map", "Draw with the bundle of a depth-to-image checkpoint."),
        ("noise_level", "It is for the bundle of an upscaler."),
        ("strength", "Variations begin as noise; --guidance-scale says how alike they are."),
    ):
        if getattr(request, name) is not None:
            raise ConfigError(
                f"{name} with a bundle that draws variations of a picture",
                f"Leave it out. {hint}",
            )


def _check_pictures(request: Request, manifest: Manifest) -> None:
    """`ConfigError` for pictures that the bundle has no use for, or does not draw without.

    The bundle is neither an upscaler's nor one that draws variations.
    """
    if request.noise_level is not None:
        raise ConfigError(
            f"noise_level is {request.noise_level}, and the bundle is no upscaler's",
            "Leave it out; strength says how far to leave the picture of --image.",
        )
    feeds_depth = takes_depth(manifest)
    if feeds_depth and (request.image is None or request.mask is not None):
        raise ConfigError(
            "the bundle's UNet is for depth to image: it takes a picture"
            + (", and no mask" if request.mask is not None else ""),
            "Give it alone: --image PICTURE; or with its depth, --depth-map MAP.",
        )
    if request.depth_map is not None and not feeds_depth:
        raise ConfigError(
            "a depth map, and the bundle's UNet sees none",
            _MAKE_LARGER
            if gives_depth(manifest)
            else "Leave --depth-map out, or draw with the bundle of a depth-to-image checkpoint: "
            "sd-export --model stabilityai/stable-diffusion-2-depth --output BUNDLE.",
        )
    if manifest.model.requires_aesthetics_score and request.image is None:
        raise ConfigError(
            "the bundle is a refiner: it does not begin a picture",
            "Give it one: --image PICTURE; or draw with the bundle of the base model.",
        )
    if takes_mask(manifest) and request.mask is None:
        raise ConfigError(
            "the bundle's UNet is for inpainting: it takes a picture and a mask",
            "Give both: --image PICTURE --mask MASK, white where it is to be repainted.",
        )
    if request.image is not None and gives_depth(manifest):
        raise ConfigError("the bundle is of LDM3D, which draws from text alone", _MAKE_LARGER)


def _check_encoder(manifest: Manifest) -> None:
    if ENCODER not in manifest.components:
        raise BundleError(
            "the bundle has no vae_encoder, so it cannot start from a picture", REMAKE_HINT
        )
