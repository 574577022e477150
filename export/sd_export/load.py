"""Makes torch modules of a checkpoint; the only file that knows the classes of other libraries.

A model is built without weights and given the file's own, one tensor at a time in float32, so it
never lies in memory twice. Names that changed over the years are brought to today's here.
"""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sd_engines.errors import ExportError
from sd_engines.spec import CONTROLNET
from sd_export.clip_vocabulary import clip_vocabulary
from sd_export.embedding import add_tokens, add_vectors
from sd_export.lora import fuse_loras
from sd_export.open_clip import PAD_TOKEN
from sd_export.preview_vae import PREVIEW_VAE
from sd_export.single_file import single_file_names
from sd_export.weights import Place, Weights
from sd_runtime.plan import pipeline_scheduler_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy as np
    import tokenizers

    from sd_export.source import Checkpoint

# transformers < 5 wrote one more level; `position_ids` was a weight until 4.31
_TEXT_PREFIX = re.compile(r"^text_model\.")
_VISION_PREFIX = re.compile(r"^vision_model\.vision_model\.")
_POSITION_IDS = re.compile(r"(^|\.)position_ids$")
# diffusers < 0.16 named the attention of the VAE's middle so
_OLD_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
_OLD_ATTENTION_NAME = re.compile(r"(mid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.")


def load_model(checkpoint: Checkpoint, component: str) -> torch.nn.Module:
    """The ``text_encoder``, ``unet``, ``vae``, ``safety_checker`` or a ControlNet in float32.

    The checkpoint's LoRAs are fused into it, and its embeddings are in it. Raises `ExportError` for
    weights that are missing, of another shape, not finite or unreadable.
    """
    config = dict(checkpoint.configs[component])
    try:
        with torch.device("meta"), _quiet():
            module = _build(component, config)
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise _error(
            component, f"its config cannot be used: {error}", "Download the checkpoint again."
        ) from error
    with Weights(checkpoint.weights[component], component=component) as weights:
        names = (
            single_file_names(weights, component)
            if checkpoint.is_in_original_layout(component)
            else {name: Place(name) for name in weights}
        )
        _assign(module, component, weights, {_todays_name(n): p for n, p in names.items()})
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:  # `position_ids` is all that is computed and not stored
            parent, _, leaf = name.rpartition(".")
            positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            module.get_submodule(parent).register_buffer(leaf, positions, persistent=False)
    module.eval().requires_grad_(requires_grad=False)
    fuse_loras(module, component, checkpoint.loras)
    if component == "text_encoder" and checkpoint.embeddings:
        first = len(_own_tokenizer(checkpoint))
        add_vectors(module, checkpoint.embeddings, first=first)
    return module


def load_tokenizer(checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """The checkpoint's tokenizer, which pads and truncates to the text encoder's positions."""
    clip = _clip_tokenizer(checkpoint)
    tokenizer: tokenizers.Tokenizer = clip.backend_tokenizer
    length = max_prompt_tokens(checkpoint)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=clip.pad_token_id, pad_token=clip.pad_token)
    return tokenizer


def max_prompt_tokens(checkpoint: Checkpoint) -> int:
    """How many tokens a prompt has, the first and the last included."""
    return int(checkpoint.configs["text_encoder"].get("max_position_embeddings", 77))


def load_pipeline(checkpoint: Checkpoint) -> Any:
    """The unmodified pipeline of diffusers for the checkpoint, without its checker.

    `StableDiffusionInpaintPipeline` where the UNet is for inpainting,
    `StableDiffusionControlNetPipeline` where there are ControlNets, else
    `StableDiffusionPipeline`, which draws latent consistency models as well, and with any
    scheduler, as their own does not.
    """
    import diffusers

    inpaint, draw = diffusers.StableDiffusionInpaintPipeline, diffusers.StableDiffusionPipeline
    pipeline_class: Any = inpaint if checkpoint.is_for_inpainting else draw
    further = {}
    config = dict(checkpoint.configs["scheduler"])
    if checkpoint.controlnets:  # its pipeline takes a scheduler's config as it is
        config = pipeline_scheduler_config(config)
        pipeline_class = diffusers.StableDiffusionControlNetPipeline
        further["controlnet"] = [load_model(checkpoint, name) for name in checkpoint.controlnets]
    with _quiet():
        scheduler_class = getattr(diffusers, checkpoint.configs["scheduler"]["_class_name"])
        pipeline = pipeline_class(
            vae=load_model(checkpoint, "vae"),
            text_encoder=load_model(checkpoint, "text_encoder"),
            tokenizer=_clip_tokenizer(checkpoint),
            unet=load_model(checkpoint, "unet"),
            scheduler=scheduler_class.from_config(config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **further,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def use_scheduler(pipeline: Any, class_name: str, config: Mapping[str, Any]) -> None:
    """Give a diffusers pipeline the scheduler ``class_name`` of ``config``.

    ``clip_sample`` is false, as Stable Diffusion's configs that have it say: where it is left out,
    some classes would clip latents as if they were pixels.
    """
    import diffusers

    scheduler_class = getattr(diffusers, class_name)
    with _quiet():
        pipeline.scheduler = scheduler_class.from_config({**config, "clip_sample": False})


def nsfw_content_detected(
    checkpoint: Checkpoint, checker: torch.nn.Module, images: np.ndarray
) -> np.ndarray:
    """What diffusers' pipeline finds in ``images``, float32 [n, H, W, 3] in [0, 1]: bool [n]."""
    import numpy as np
    from diffusers.image_processor import VaeImageProcessor

    with _quiet():
        processor = _image_processor(checkpoint.configs["feature_extractor"])
        pictures = VaeImageProcessor.numpy_to_pil(images)
        pixels = processor(pictures, return_tensors="pt").pixel_values
        _, found = checker(clip_input=pixels, images=[image.copy() for image in images])
    return np.asarray(found, dtype=bool)


def reference_versions() -> dict[str, str]:
    """Versions of the libraries whose models are the reference."""
    import diffusers
    import transformers

    return {"diffusers": diffusers.__version__, "transformers": transformers.__version__}


def _build(component: str, config: dict[str, Any]) -> torch.nn.Module:
    if component == "unet":
        from diffusers import UNet2DConditionModel

        unet: torch.nn.Module = UNet2DConditionModel.from_config(config)
        return unet
    if component == "vae":
        from diffusers import AutoencoderKL

        vae: torch.nn.Module = AutoencoderKL.from_config(config)
        return vae
    if component == PREVIEW_VAE:
        from diffusers import AutoencoderTiny

        tiny: torch.nn.Module = AutoencoderTiny.from_config(config)
        return tiny
    if component == "text_encoder":
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig.from_dict(config))
    if component.startswith(CONTROLNET):
        from diffusers import ControlNetModel

        controlnet: torch.nn.Module = ControlNetModel.from_config(config)
        return controlnet
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    checker: torch.nn.Module = StableDiffusionSafetyChecker(CLIPConfig.from_dict(config))
    return checker


def _assign(
    module: torch.nn.Module, component: str, weights: Weights, stored: Mapping[str, Place]
) -> None:
    """Give ``module`` its weights; ``stored`` maps today's names to their places."""
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in stored]
    unknown = [name for name in stored if name not in wanted and not _POSITION_IDS.search(name)]
    if missing or unknown:
        problem = f"{len(missing)} weights are missing" if missing else ""
        if unknown:
            problem += f"{' and ' if missing else ''}{len(unknown)} do not belong to it"
        raise _error(
            component,
            f"{problem}, the first is {(missing or unknown)[0]}",
            "The config and the weights are of different models; download the checkpoint again.",
        )
    state = {}
    for name, like in wanted.items():
        tensor = _read(weights, stored[name], component)
        if tensor.shape != like.shape and tensor.numel() == like.numel():
            squeezed = [size for size in tensor.shape if size != 1]
            if squeezed == [size for size in like.shape if size != 1]:
                tensor = tensor.reshape(like.shape)  # a 1×1 convolution that became a linear layer
        if tensor.shape != like.shape:
            raise _error(
                component,
                f"{name} has shape {tuple(tensor.shape)}, the config says {tuple(like.shape)}",
                "The config and the weights are of different models; download the checkpoint "
                "again.",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise _error(
                component,
                f"{name} holds values that are not finite",
                "The weights are broken; use another revision or file of the checkpoint.",
            )
        state[name] = tensor
    module.load_state_dict(state, assign=True)


def _read(weights: Weights, place: Place, component: str) -> torch.Tensor:
    name = place.name
    try:
        tensor = weights.tensor(place)
    except (OSError, RuntimeError, ValueError) as error:
        raise _error(component, f"{name} cannot be read: {error}", "Download it again.") from error
    if not tensor.is_floating_point():
        raise _error(component, f"{name} is {tensor.dtype}", "Use weights in fp32, fp16 or bf16.")
    return tensor.to(torch.float32, copy=True).contiguous()


def _todays_name(name: str) -> str:
    name = _TEXT_PREFIX.sub("", name)
    name = _VISION_PREFIX.sub("vision_model.", name)
    return _OLD_ATTENTION_NAME.sub(lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name)


def _clip_tokenizer(checkpoint: Checkpoint) -> Any:
    """A tokenizer of transformers, with the tokens of the checkpoint's embeddings."""
    tokenizer = _own_tokenizer(checkpoint)
    add_tokens(tokenizer, checkpoint.embeddings)
    return tokenizer


def _own_tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import CLIPTokenizer

    length = max_prompt_tokens(checkpoint)
    try:
        with _quiet():
            if checkpoint.tokenizer is None:
                vocabulary, merges = clip_vocabulary()
                v2 = checkpoint.family == "stable-diffusion-v2"
                return CLIPTokenizer(
                    vocab=vocabulary,
                    merges=merges,  # type: ignore[arg-type]  # what the call takes is pairs
                    model_max_length=length,
                    pad_token=PAD_TOKEN if v2 else "<|endoftext|>",
                )
            return CLIPTokenizer.from_pretrained(
                _real(checkpoint.tokenizer), model_max_length=length
            )
    except Exception as error:  # `tokenizers` raises bare Exception
        if isinstance(error, (MemoryError, ImportError)):
            raise
        raise _error(
            "tokenizer", f"cannot be read: {error}", "Download the checkpoint again."
        ) from error


def _real(folder: Path) -> str:
    return str(folder.absolute())


def _image_processor(config: Mapping[str, Any]) -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(**{k: v for k, v in config.items() if not k.endswith("_type")})


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' advice to developers out of the user's terminal."""
    names = ("diffusers", "transformers")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():  # of old scheduler configs, which it then corrects
            warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _error(component: str, message: str, hint: str) -> ExportError:
    return ExportError(message, hint, component=component, stage="load")
