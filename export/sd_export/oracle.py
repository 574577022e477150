"""The unmodified diffusers, which every export is proven against: its pipelines and their parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sd_engines.errors import ExportError
from sd_engines.spec import TEXT_ENCODERS
from sd_export.checkpoint import TOKENIZER_FOLDERS
from sd_export.family import is_xl
from sd_export.kind import Kind
from sd_export.load import clip_tokenizer, load_model, quiet
from sd_export.wrappers import vae_scaling_factor
from sd_runtime.scheduler_config import pipeline_scheduler_config
from sd_runtime.task import DEPTH_ESTIMATOR, IMAGE_ENCODER
from sd_runtime.upscaling import DEFAULT_NOISE_LEVEL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from sd_engines.spec import Profile
    from sd_export.checkpoint import Checkpoint
    from sd_runtime.request import Request

LDM3D_UPSCALER_REFERENCE = "StableDiffusionUpscalePipeline on VaeImageProcessorLDM3D, AutoencoderKL"
"""What stands for diffusers' pipeline of LDM3D's upscaler, for the certificate."""
_TAKE_CONFIG_AS_IT_IS = (Kind.DEPTH, Kind.VARIATIONS, Kind.LDM3D)
"""Kinds whose pipelines do not correct a scheduler's old config, nor does that of ControlNets."""


def load_pipeline(checkpoint: Checkpoint) -> Any:
    """The unmodified pipeline of diffusers for the checkpoint, without its checker or watermark.

    The one for what the UNet is for, for image-to-image where it is a refiner's, LDM3D's where the
    VAE paints depth, the one of ControlNets where there are any, else the one for text, which draws
    latent consistency models as well, and with any scheduler, as their own does not. For LDM3D's
    upscaler the x4 upscaler's, which `ldm3d_upscaler_inputs` makes into its own.
    """
    import diffusers

    xl, kind = is_xl(checkpoint.configs), checkpoint.kind
    task = "ControlNet" if checkpoint.controlnets else kind.value
    task = Kind.X4_UPSCALER.value if kind is Kind.LDM3D_UPSCALER else task
    config = dict(checkpoint.configs["scheduler"])
    if checkpoint.controlnets or kind in _TAKE_CONFIG_AS_IT_IS:
        config = pipeline_scheduler_config(config, family=checkpoint.family)
    with quiet():
        pipeline_class = getattr(diffusers, f"StableDiffusion{'XL' if xl else ''}{task}Pipeline")
        options = _options(checkpoint)
        for encoder in TEXT_ENCODERS if xl else checkpoint.text_encoders:
            present = encoder in checkpoint.text_encoders
            tokenizer = TOKENIZER_FOLDERS[encoder]
            options[encoder] = load_model(checkpoint, encoder) if present else None
            options[tokenizer] = clip_tokenizer(checkpoint, encoder) if present else None
        scheduler_class = getattr(diffusers, checkpoint.configs["scheduler"]["_class_name"])
        pipeline = pipeline_class(
            vae=load_model(checkpoint, "vae"),
            unet=load_model(checkpoint, "unet"),
            scheduler=scheduler_class.from_config(config),
            **options,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _options(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the pipeline of the checkpoint's kind takes that not every other does."""
    import diffusers

    kind = checkpoint.kind
    if kind is Kind.X2_UPSCALER:
        return {}
    processor = None
    if kind in (Kind.DEPTH, Kind.VARIATIONS):
        processor = _image_processor(checkpoint.configs["feature_extractor"])
    options: dict[str, Any] = {"feature_extractor": processor}
    if kind is Kind.DEPTH:
        return {**options, DEPTH_ESTIMATOR: load_model(checkpoint, DEPTH_ESTIMATOR)}
    if kind is Kind.LDM3D_UPSCALER:
        levels = int(checkpoint.configs["unet"].get("num_class_embeds") or DEFAULT_NOISE_LEVEL + 1)
        no_noise = diffusers.DDPMScheduler(trained_betas=[0.0] * levels)
        return {**options, "low_res_scheduler": no_noise}
    if kind is Kind.X4_UPSCALER:
        low_res = diffusers.DDPMScheduler.from_config(checkpoint.configs["low_res_scheduler"])
        most = checkpoint.max_noise_level
        return {**options, "low_res_scheduler": low_res, "max_noise_level": most}
    if is_xl(checkpoint.configs):
        zeros = checkpoint.force_zeros_for_empty_prompt
        options |= {"add_watermarker": False, "force_zeros_for_empty_prompt": zeros}
        if kind is not Kind.TEXT:
            options["requires_aesthetics_score"] = checkpoint.requires_aesthetics_score
    else:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    if kind is Kind.VARIATIONS:
        options[IMAGE_ENCODER] = load_model(checkpoint, IMAGE_ENCODER)
    if kind is Kind.LDM3D:
        options[IMAGE_ENCODER] = None  # an IP-Adapter's
    if checkpoint.controlnets:
        options["controlnet"] = [load_model(checkpoint, name) for name in checkpoint.controlnets]
    return options


def ldm3d_upscaler_inputs(
    pipeline: Any,
    request: Request,
    *,
    checkpoint: Checkpoint,
    profile: Profile,
    generator: torch.Generator,
) -> dict[str, Any]:
    """What makes `load_pipeline`'s ``pipeline`` draw ``request`` as that of LDM3D's upscaler does.

    `StableDiffusionUpscaleLDM3DPipeline` lies among diffusers' community examples, and is not
    installed. Its steps are those of `StableDiffusionUpscalePipeline`, which is shown latents of
    picture and depth, of 16 bits, in the place of a small picture, with no noise on them.
    ``generator`` is the one that it is called with too: its first draw there would be that noise,
    as many numbers as the first latents, which are drawn here in its place.
    """
    import numpy as np
    from diffusers.image_processor import VaeImageProcessorLDM3D
    from PIL import Image

    scaling_factor = vae_scaling_factor(checkpoint)
    pipeline.vae.register_to_config(scaling_factor=scaling_factor)  # the pipeline put its own there
    processor = VaeImageProcessorLDM3D(
        vae_scale_factor=profile.vae_scale_factor, resample="bilinear"
    )
    depth = Image.fromarray(request.depth_map.values.astype(np.uint16))
    size = [profile.height, profile.width]
    seen = processor.preprocess(request.image.image, depth, target_res=size)
    posterior = pipeline.vae.encode(torch.cat(seen, dim=1)).latent_dist
    image = posterior.sample(generator) * scaling_factor
    latents = torch.randn(image.shape, generator=generator.clone_state())
    noise_level = request.noise_level
    if noise_level is None:
        noise_level = min(DEFAULT_NOISE_LEVEL, checkpoint.max_noise_level or 0)
    return {"image": image, "latents": latents, "noise_level": noise_level}


def use_scheduler(pipeline: Any, class_name: str, config: Mapping[str, Any]) -> None:
    """Give a diffusers pipeline the scheduler ``class_name`` of ``config``.

    ``clip_sample`` is false, as Stable Diffusion's configs that have it say: where it is left out,
    some classes would clip latents as if they were pixels.
    """
    import diffusers

    scheduler_class = getattr(diffusers, class_name)
    with quiet():
        pipeline.scheduler = scheduler_class.from_config({**config, "clip_sample": False})


def nsfw_content_detected(
    checkpoint: Checkpoint, checker: torch.nn.Module, images: np.ndarray
) -> np.ndarray:
    """What diffusers' pipeline finds in ``images``, float32 [n, H, W, 3] in [0, 1]: bool [n]."""
    import numpy as np
    from diffusers.image_processor import VaeImageProcessor

    with quiet():
        processor = _image_processor(checkpoint.configs["feature_extractor"])
        pictures = VaeImageProcessor.numpy_to_pil(images)
        pixels = processor(pictures, return_tensors="pt").pixel_values
        _, found = checker(clip_input=pixels, images=[image.copy() for image in images])
    return np.asarray(found, dtype=bool)


def depth_mask(
    checkpoint: Checkpoint,
    estimator: torch.nn.Module,
    images: np.ndarray,
    *,
    vae_scale_factor: int,
) -> np.ndarray:
    """What diffusers' pipeline estimates of ``images``, float32 [n, H, W, 3] in [0, 1].

    float32 [n, 1, h, w]; `ExportError` where the estimator cannot look at pictures of their size.
    """
    import diffusers

    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")  # not for this part of it
    with quiet():
        pipeline = diffusers.StableDiffusionDepth2ImgPipeline(
            **dict.fromkeys(names),
            depth_estimator=estimator,
            feature_extractor=_image_processor(checkpoint.configs["feature_extractor"]),
        )
        pipeline.vae_scale_factor = vae_scale_factor
        pictures = pipeline.image_processor.numpy_to_pil(images)
        try:
            mask = pipeline.prepare_depth_map(
                pictures, None, len(pictures), False, torch.float32, torch.device("cpu")
            )
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            height, width = images.shape[1:3]
            raise ExportError(
                f"it cannot look at pictures of {height}×{width} (height × width): {error}",
                "Its config and its feature_extractor are of different models, or it takes square "
                "pictures alone: try --height and --width of the same number.",
                component=DEPTH_ESTIMATOR,
                stage="load",
            ) from error
    found: np.ndarray = mask.numpy()
    return found


def image_embeds(
    checkpoint: Checkpoint, encoder: torch.nn.Module, images: np.ndarray
) -> np.ndarray:
    """What diffusers' pipeline reads of ``images``, float32 [n, H, W, 3] in [0, 1]: [n, 1, d]."""
    import diffusers

    names = ("vae", "unet", "scheduler", "safety_checker")  # not for this part of it
    with quiet():
        pipeline = diffusers.StableDiffusionImageVariationPipeline(
            **dict.fromkeys(names),
            image_encoder=encoder,
            feature_extractor=_image_processor(checkpoint.configs["feature_extractor"]),
            requires_safety_checker=False,
        )
        pictures = pipeline.image_processor.numpy_to_pil(images)
        embeds: torch.Tensor = pipeline._encode_image(pictures, torch.device("cpu"), 1, False)
    return embeds.numpy()


def decoded_images(
    vae: Any, latents: torch.Tensor, *, gives_depth: bool
) -> tuple[torch.Tensor, ...]:
    """What diffusers' pipelines make of ``latents``: [b, H, W, 3] in [0, 1], depth likewise.

    ``vae`` is an AutoencoderKL or AutoencoderTiny; both say what their latents are scaled by.
    """
    from diffusers.image_processor import VaeImageProcessor

    painted = vae.decode(latents / vae.config.scaling_factor).sample
    images = VaeImageProcessor.denormalize(painted).permute(0, 2, 3, 1)
    return (images[..., :3], images[..., 3:]) if gives_depth else (images,)


def encoded_images(vae: Any, seen: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [b, c, h, w] of the scaled latents of ``seen``.

    That is pictures [b, H, W, 3] in [0, 1], and depth [b, H, W, 1] where ``vae`` takes it.
    """
    from diffusers.image_processor import VaeImageProcessor

    pixels = VaeImageProcessor.normalize(torch.cat(list(seen), dim=-1).permute(0, 3, 1, 2))
    latents, factor = vae.encode(pixels).latent_dist, vae.config.scaling_factor
    return latents.mode() * factor, latents.std * factor


def _image_processor(config: Mapping[str, Any]) -> Any:
    """The one of the config's kind that works with Pillow; a kind's name changed over the years."""
    from transformers import CLIPImageProcessorPil, DPTImageProcessorPil

    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    processor: Any = DPTImageProcessorPil if kind.startswith("DPT") else CLIPImageProcessorPil
    return processor(**{k: v for k, v in config.items() if not k.endswith("_type")})
