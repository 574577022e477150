"""Which kinds of checkpoint can be exported, what each draws with by default, and what others are.

A checkpoint says what it is in three places: the class in model_index.json, the configs of its
models, and in a single file the names of its weights.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ExportError
from sd_engines.spec import Defaults

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LATENT_CONSISTENCY = Defaults(num_inference_steps=4, guidance_scale=8.5)
"""What diffusers' LatentConsistencyModelPipeline draws with where it is not told."""
_PIPELINES = {
    "StableDiffusionPipeline": Defaults(),
    "StableDiffusionImg2ImgPipeline": Defaults(),
    "StableDiffusionInpaintPipeline": Defaults(),
    "LatentConsistencyModelPipeline": LATENT_CONSISTENCY,
    "LatentConsistencyModelImg2ImgPipeline": LATENT_CONSISTENCY,
}
_HINT = (
    "sd-export takes Stable Diffusion v1 and v2 checkpoints, those for inpainting among them, and "
    "latent consistency models of the same shape; ControlNets beside one, by --controlnet."
)
_OTHER_PIPELINES = (  # by the name of diffusers' class; the first that fits
    ("StableDiffusionXL", "Stable Diffusion XL"),
    ("StableDiffusion3", "Stable Diffusion 3"),
    ("Flux", "Flux"),
    ("ControlNet", "Stable Diffusion with a ControlNet"),
    ("Adapter", "Stable Diffusion with a T2I-Adapter"),
    ("AnimateDiff", "AnimateDiff"),
    ("VideoDiffusion|TextToVideo", "a video model"),
    ("Upscale", "an upscaler"),
    ("Depth2Img", "Stable Diffusion 2 depth to image"),
    ("UnCLIP", "Stable unCLIP"),
    ("ImageVariation", "Stable Diffusion image variations"),
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
    (r"conditioner\.embedders\.1\.", "a Stable Diffusion XL checkpoint"),
    (r"conditioner\.embedders\.0\.(?!model\.)", "a Stable Diffusion XL checkpoint"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 checkpoint"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "a Flux checkpoint"),
    (r"clip_(txt|text)_mapper\.", "a Stable Cascade checkpoint"),
    (r"depth_model\.", "a Stable Diffusion 2 depth-to-image checkpoint"),
    (r"noise_augmentor\.|embedder\.model\.visual\.", "a Stable unCLIP checkpoint"),
    (r"low_scale_model\.", "an upscaler"),
    (r"model\.diffusion_model\.label_emb\.", "the refiner of Stable Diffusion XL or an upscaler"),
    (r"((en|de)coder\.)?(down|up)_blocks\.|text_model\.", "one model of a folder, not the whole"),
)
_BY_CHANNELS = {
    5: "depth to image",
    7: "an upscaler",
    8: "InstructPix2Pix",
}
"""What a UNet is for that sees more than four channels of latents, and not the nine of inpainting:
latents, mask and masked latents."""


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


def check_configs(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """`ExportError` that says what has the layout of Stable Diffusion but is another model."""
    unet, vae = configs["unet"], configs["vae"]
    problem = None
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        problem = f"the denoiser is a {unet['_class_name']}"
    elif vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        problem = f"the VAE is a {vae['_class_name']}"
    elif unet.get("addition_embed_type") or unet.get("encoder_hid_dim_type"):
        problem = "its UNet takes further conditioning (Stable Diffusion XL, Kandinsky)"
    elif unet.get("class_embed_type"):
        problem = "its UNet takes an embedded picture (Stable unCLIP)"
    elif unet.get("num_class_embeds"):
        problem = "its UNet takes class labels (an upscaler)"
    elif unet.get("in_channels", 4) not in (
        channels := vae.get("latent_channels", 4),
        2 * channels + 1,
    ):
        seen = unet.get("in_channels")
        kind = _BY_CHANNELS.get(int(seen or 0), "another task")
        problem = f"its UNet takes {seen} channels for {channels} of latents ({kind})"
    elif not isinstance(unet.get("cross_attention_dim"), int):
        problem = "its UNet has several widths of cross attention"
    elif unet["cross_attention_dim"] != configs["text_encoder"].get("hidden_size"):
        problem = (
            f"its UNet takes prompts of width {unet['cross_attention_dim']}, its text encoder "
            f"makes {configs['text_encoder'].get('hidden_size')}"
        )
    elif vae.get("shift_factor") or vae.get("latents_mean"):
        problem = "its VAE shifts its latents"
    if problem is not None:
        raise _error(f"not a Stable Diffusion model that can be exported: {problem}")


def family_of(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """The family's name in the manifest: v2 reads prompts with OpenCLIP, v1 with OpenAI's CLIP.

    transformers holds both in one class; what differs is the activation.
    """
    open_clip = configs["text_encoder"].get("hidden_act") == "gelu"
    return "stable-diffusion-v2" if open_clip else "stable-diffusion-v1"


def _error(message: str) -> ExportError:
    return ExportError(message, _HINT, component="checkpoint", stage="load")
