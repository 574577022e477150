"""Which kinds of checkpoint can be exported, what each draws with by default, and what others are.

A checkpoint says what it is in three places: the class in model_index.json, the configs of its
models, and in a single file the names of its weights.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ExportError
from sd_engines.spec import (
    LDM3D_UPSCALER,
    STABLE_DIFFUSION_XL,
    TEXT_ENCODERS,
    X2_UPSCALER,
    X4_UPSCALER,
    Defaults,
)
from sd_runtime.task import DEPTH_ESTIMATOR, IMAGE_ENCODER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

LATENT_CONSISTENCY = Defaults(num_inference_steps=4, guidance_scale=8.5)
"""What diffusers' LatentConsistencyModelPipeline draws with where it is not told."""
XL = Defaults(guidance_scale=5.0, strength=0.3, inpainting_strength=0.9999)
"""What diffusers' StableDiffusionXLPipeline and its kin draw with where they are not told."""
CONTROLNET_STRENGTH = 0.8
"""How far diffusers' pipelines with a ControlNet leave a picture, those of XL among them."""
UPSCALING = Defaults(num_inference_steps=75, guidance_scale=9.0)
"""What diffusers' StableDiffusionUpscalePipeline and the latent one draw with, likewise."""
LDM3D_PIPELINE = "StableDiffusionLDM3DPipeline"
LDM3D_UPSCALER_PIPELINE = "StableDiffusionUpscaleLDM3DPipeline"
"""A community pipeline of diffusers, which it does not install."""
_PIPELINES = {
    "StableDiffusionPipeline": Defaults(),
    "StableDiffusionImg2ImgPipeline": Defaults(),
    "StableDiffusionInpaintPipeline": Defaults(),
    "StableDiffusionDepth2ImgPipeline": Defaults(),
    "StableDiffusionImageVariationPipeline": Defaults(),
    "StableDiffusionPipelineSafe": Defaults(),
    LDM3D_PIPELINE: Defaults(num_inference_steps=49, guidance_scale=5.0),
    "LatentConsistencyModelPipeline": LATENT_CONSISTENCY,
    "LatentConsistencyModelImg2ImgPipeline": LATENT_CONSISTENCY,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLImg2ImgPipeline": XL,
    "StableDiffusionXLInpaintPipeline": replace(XL, guidance_scale=7.5),
    "StableDiffusionUpscalePipeline": UPSCALING,
    "StableDiffusionLatentUpscalePipeline": UPSCALING,
    LDM3D_UPSCALER_PIPELINE: UPSCALING,
}
_HINT = (
    "sd-export takes Stable Diffusion v1, v2 and XL checkpoints, those for inpainting, the refiner "
    "and (as folders) depth to image, image variations, the x4 upscaler and the x2 latent upscaler "
    "among them, and latent consistency models, LDM3D and its upscaler of the same shape; beside "
    "one ControlNets, by --controlnet."
)
_OTHER_PIPELINES = (  # by the name of diffusers' class; the first that fits
    ("StableDiffusion3", "Stable Diffusion 3"),
    ("Flux", "Flux"),
    ("ControlNet", "Stable Diffusion with a ControlNet"),
    ("Adapter", "Stable Diffusion with a T2I-Adapter"),
    ("AnimateDiff", "AnimateDiff"),
    ("VideoDiffusion|TextToVideo", "a video model"),
    ("UnCLIP", "Stable unCLIP"),
    ("InstructPix2Pix", "InstructPix2Pix"),
    ("Kandinsky", "Kandinsky"),
    ("PixArt", "PixArt"),
    ("Cascade|Wuerstchen", "Stable Cascade"),
    ("^IF", "DeepFloyd IF"),
)
_OTHER_FILES = (  # by what the names of a file's weights start with; the first that fits
    (r"lora_(unet|te)|.*\.lora_(down|up|A|B)\.", "a LoRA, which is no whole checkpoint"),
    (r"control_model\.|input_hint_block\.|controlnet_cond_embedding\.", "a ControlNet"),
    (r".*\bmotion_modules\.", "AnimateDiff's motion module"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 checkpoint"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "a Flux checkpoint"),
    (r"clip_(txt|text)_mapper\.", "a Stable Cascade checkpoint"),
    (r"depth_model\.", "a Stable Diffusion 2 depth-to-image checkpoint in one file"),
    (r"noise_augmentor\.|embedder\.model\.visual\.", "a Stable unCLIP checkpoint"),
    (r"low_scale_model\.", "an upscaler in one file"),
    (r"model\.diffusion_model\.label_emb\.weight", "an upscaler in one file"),
    (r"((en|de)coder\.)?(down|up)_blocks\.|text_model\.", "one model of a folder, not the whole"),
)
REFINER_TIME_IDS = 5
"""How many numbers a refiner is told of a picture; its base model is told 6."""
_PAINTED = {LDM3D_PIPELINE: (4, 6), LDM3D_UPSCALER_PIPELINE: (4,)}
"""A picture's three channels, and those of its depth: one, or a picture of it."""
_BY_CHANNELS = {
    7: "an upscaler without its class labels",
    8: "InstructPix2Pix",
}
"""What a UNet is for that sees more than four channels of latents, and neither the nine of
inpainting (latents, mask and masked latents) nor the five of depth to image."""
_PIXEL_CHANNELS = 3
NOISE_LEVEL_WIDTH = 128
"""How many of the numbers that a latent upscaler's UNet takes beside the timestep say how noisy
the small latents are; the others are the pooled prompt."""


def pipeline_defaults(class_name: str, *, source: str) -> Defaults:
    """What diffusers' pipeline ``class_name`` draws with; `ExportError` names any other kind."""
    if class_name in _PIPELINES:
        return _PIPELINES[class_name]
    kinds = (words for pattern, words in _OTHER_PIPELINES if re.search(pattern, class_name))
    kind = next(kinds, None)
    what = f"{kind} ({class_name})" if kind else f"for {class_name}"
    raise _error(f"{source} is {what}, which is not supported")


def lone_model(config: Mapping[str, Any]) -> str | None:
    """What a folder without model_index.json holds, from its own config.json; None: no telling."""
    names = config.get("_class_name") or config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    return str(name) if name else None


def check_names(names: Iterable[str]) -> None:
    """`ExportError` that says what a single file is, where its weights' names tell another kind."""
    known = list(names)
    for pattern, what in _OTHER_FILES:
        if any(re.match(pattern, name) for name in known):
            raise _error(f"this is {what}")


def check_configs(
    configs: Mapping[str, Mapping[str, Any]], *, pipeline: str = "StableDiffusionPipeline"
) -> None:
    """`ExportError` that says what has the layout of Stable Diffusion but is another model.

    ``pipeline`` is the class that model_index.json names.
    """
    unet, vae = configs["unet"], configs["vae"]
    channels = latent_channels(vae)
    text_width = sum(configs[name]["hidden_size"] for name in text_encoders(configs))
    text_width = text_width or configs.get(IMAGE_ENCODER, {}).get("projection_dim", 512)
    upscales_depth = is_ldm3d_upscaler(configs)
    upscales = is_upscaler(configs) or is_latent_upscaler(configs) or upscales_depth
    problem = None
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        problem = f"the denoiser is a {unet['_class_name']}"
    elif vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        problem = f"the VAE is a {vae['_class_name']}"
    elif (kind := unet.get("encoder_hid_dim_type") or unet.get("addition_embed_type")) not in (
        None,
        "text_time",
    ):
        problem = f"its UNet takes further conditioning, {kind} (Kandinsky, Kolors)"
    elif kind == "text_time" and num_time_ids(configs) not in (6, REFINER_TIME_IDS):
        problem = "its UNet takes not the pooled prompt and sizes of Stable Diffusion XL"
    elif unet.get("class_embed_type"):
        problem = "its UNet takes an embedded picture (Stable unCLIP)"
    elif unet.get("num_class_embeds") and not (is_upscaler(configs) or upscales_depth):
        problem = "its UNet takes class labels, and no picture beside them as an upscaler's"
    elif is_upscaler(configs) and "safety_checker" in configs:
        problem = "it is an upscaler with a safety checker, which diffusers cannot run on it"
    elif is_latent_upscaler(configs) and (
        unet["time_cond_proj_dim"] != NOISE_LEVEL_WIDTH + text_width
    ):
        problem = "its UNet takes not the pooled prompt and noise level of a latent upscaler"
    elif not upscales and unet.get("in_channels", 4) not in (
        channels,
        channels + 1,
        2 * channels + 1,
    ):
        seen = unet.get("in_channels")
        kind = _BY_CHANNELS.get(int(seen or 0), "another task")
        problem = f"its UNet takes {seen} channels for {channels} of latents ({kind})"
    elif (unet.get("in_channels", 4) == channels + 1) != (DEPTH_ESTIMATOR in configs):
        lacks = "UNet sees no depth" if DEPTH_ESTIMATOR in configs else "depth estimator is missing"
        problem = f"it is for depth to image, and its {lacks}"
    elif (kind := configs.get(DEPTH_ESTIMATOR, {}).get("model_type", "dpt")) != "dpt":
        problem = f"its depth estimator is of the kind {kind}, not dpt"
    elif not isinstance(unet.get("cross_attention_dim"), int):
        problem = "its UNet has several widths of cross attention"
    elif unet["cross_attention_dim"] != text_width:
        problem = (
            f"its UNet takes prompts of width {unet['cross_attention_dim']}, its encoder makes "
            f"{text_width}"
        )
    elif vae.get("shift_factor") or vae.get("latents_mean"):
        problem = "its VAE shifts its latents"
    elif painted_channels(configs) not in _PAINTED.get(pipeline, (3,)):
        problem = f"its VAE paints {painted_channels(configs)} channels for {pipeline}"
    elif upscales_depth != (pipeline == LDM3D_UPSCALER_PIPELINE):
        problem = f"its UNet takes {unet.get('in_channels', 4)} channels for {pipeline}"
    elif upscales_depth and vae.get("in_channels", 3) != painted_channels(configs):
        problem = f"its VAE takes {vae.get('in_channels', 3)} channels and paints 4"
    if problem is not None:
        raise _error(f"not a Stable Diffusion model that can be exported: {problem}")


def family_of(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """The family's name in the manifest: v2 reads prompts with OpenCLIP, v1 with OpenAI's CLIP.

    transformers holds both in one class; what differs is the activation. XL's UNet takes sizes,
    the x4 upscaler's a small picture, the x2 one's its latents, LDM3D's those of its depth too.
    """
    if is_latent_upscaler(configs):
        return X2_UPSCALER
    if is_upscaler(configs):
        return X4_UPSCALER
    if is_ldm3d_upscaler(configs):
        return LDM3D_UPSCALER
    if is_xl(configs):
        return STABLE_DIFFUSION_XL
    open_clip = configs.get("text_encoder", {}).get("hidden_act") == "gelu"
    return "stable-diffusion-v2" if open_clip else "stable-diffusion-v1"


def is_xl(configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the UNet takes the pooled prompt and sizes, as Stable Diffusion XL's does."""
    return configs["unet"].get("addition_embed_type") == "text_time"


def is_upscaler(configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the UNet takes a small picture's pixels, and a class label that says how noisy."""
    unet, channels = configs["unet"], latent_channels(configs["vae"])
    takes_pixels = unet.get("in_channels", 4) == channels + _PIXEL_CHANNELS
    return takes_pixels and bool(unet.get("num_class_embeds"))


def is_latent_upscaler(configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the UNet takes a small picture's latents and the pooled prompt, as k-diffusion's."""
    unet, channels = configs["unet"], latent_channels(configs["vae"])
    return (
        unet.get("time_embedding_type") == "fourier"
        and bool(unet.get("time_cond_proj_dim"))
        and (unet.get("in_channels"), unet.get("out_channels")) == (2 * channels, channels + 1)
    )


def is_ldm3d_upscaler(configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the UNet takes latents beside its own, of a VAE that paints depth."""
    channels = latent_channels(configs["vae"])
    return configs["unet"].get("in_channels", 4) == 2 * channels and painted_channels(configs) > 3


def text_encoders(configs: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The text encoders that a checkpoint has, in the order of `TEXT_ENCODERS`."""
    return tuple(name for name in TEXT_ENCODERS if name in configs)


def num_time_ids(configs: Mapping[str, Mapping[str, Any]]) -> float:
    """How many numbers of a picture's size the UNet takes beside the pooled prompt, if whole."""
    unet = configs["unet"]
    pooled = configs.get("text_encoder_2", {}).get("projection_dim")
    width = unet.get("projection_class_embeddings_input_dim")
    step = unet.get("addition_time_embed_dim")
    if not (isinstance(pooled, int) and isinstance(width, int) and isinstance(step, int) and step):
        return 0
    return (width - pooled) / step


def latent_channels(vae_config: Mapping[str, Any]) -> int:
    """Channels of a VAE's latents, the tiny one's too."""
    return int(vae_config.get("latent_channels", 4))


def vae_scale_factor(block_out_channels: Sequence[int]) -> int:
    """Pixels of a picture's side to one of its latents': every block of a VAE but one halves."""
    return 1 << (len(block_out_channels) - 1)


def painted_channels(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Channels of what the VAE makes of latents: a picture's three, and more of an LDM3D."""
    return int(configs["vae"].get("out_channels", 3))


def is_refiner(configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the UNet is told of a picture's aesthetic score in the place of its target size."""
    return is_xl(configs) and num_time_ids(configs) == REFINER_TIME_IDS


def _error(message: str) -> ExportError:
    return ExportError(message, _HINT, component="checkpoint", stage="load")
