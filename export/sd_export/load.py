"""Makes torch modules and tokenizers of a checkpoint, of other libraries' classes.

A model is built without weights and given the file's own, one tensor at a time in float32, so it
never lies in memory twice. Names that changed over the years are brought to today's here.
"""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sd_engines.errors import ExportError
from sd_engines.spec import CONTROLNET
from sd_export.checkpoint import TOKENIZER_FOLDERS
from sd_export.clip_vocabulary import clip_vocabulary
from sd_export.embedding import add_tokens, add_vectors
from sd_export.lora import fuse_loras
from sd_export.open_clip import PAD_TOKEN
from sd_export.preview_vae import PREVIEW_VAE
from sd_export.quiet import quiet_loggers
from sd_export.single_file_names import single_file_names
from sd_export.weights import Place, Weights
from sd_runtime.task import DEPTH_ESTIMATOR, IMAGE_ENCODER

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import tokenizers

    from sd_export.checkpoint import Checkpoint

# transformers < 5 wrote one more level; `position_ids` was a weight until 4.31
_TEXT_PREFIX = re.compile(r"^text_model\.")
_VISION_PREFIX = re.compile(r"^vision_model\.vision_model\.")
_POSITION_IDS = re.compile(r"(^|\.)position_ids$")
_NO_WEIGHTS = re.compile(r"(^|\.)num_batches_tracked$")  # how long a batch norm was trained
# diffusers < 0.16 named the attention of the VAE's middle so
_OLD_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
_OLD_ATTENTION_NAME = re.compile(r"(mid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.")


def load_model(checkpoint: Checkpoint, component: str) -> torch.nn.Module:
    """A text encoder, the ``unet``, ``vae``, a ControlNet or a model of pictures in float32.

    The checkpoint's LoRAs are fused into it, and its embeddings are in it. Raises `ExportError` for
    weights that are missing, of another shape, not finite or unreadable.
    """
    config = dict(checkpoint.configs[component])
    try:
        with torch.device("meta"), quiet():
            module = _build(component, config)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # each library raises its own, and what its arithmetic does
        raise _error(
            component, f"its config cannot be used: {error}", "Download the checkpoint again."
        ) from error
    with Weights(checkpoint.weights[component], component=component) as weights:
        names = (
            single_file_names(weights, component)
            if checkpoint.is_in_original_layout(component)
            else {name: Place(name) for name in weights}
        )
        names = {_todays_name(name, component): place for name, place in names.items()}
        _assign(module, component, weights, names)
    for name, buffer in list(module.named_buffers()):
        if _NO_WEIGHTS.search(name):
            buffer.data = torch.zeros(buffer.shape, dtype=buffer.dtype)
        elif buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            owner = module.get_submodule(parent)
            owner.register_buffer(leaf, _computed(owner, leaf, buffer), persistent=False)
    module.eval().requires_grad_(requires_grad=False)
    fuse_loras(module, component, checkpoint.loras, components=checkpoint.weights)
    embeddings = checkpoint.embeddings_of(component)
    if embeddings:
        add_vectors(module, embeddings, first=len(_own_tokenizer(checkpoint, component)))
    return module


def load_tokenizer(
    checkpoint: Checkpoint, text_encoder: str = "text_encoder"
) -> tokenizers.Tokenizer:
    """The tokenizer of ``text_encoder``, which pads and truncates to the encoder's positions."""
    clip = clip_tokenizer(checkpoint, text_encoder)
    tokenizer: tokenizers.Tokenizer = clip.backend_tokenizer
    length = checkpoint.max_prompt_tokens
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=clip.pad_token_id, pad_token=clip.pad_token)
    return tokenizer


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
    if component == "text_encoder_2":
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))
    if component.startswith(CONTROLNET):
        from diffusers import ControlNetModel

        controlnet: torch.nn.Module = ControlNetModel.from_config(config)
        return controlnet
    if component == IMAGE_ENCODER:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(config))
    if component == DEPTH_ESTIMATOR:
        from transformers import DPTConfig, DPTForDepthEstimation

        return DPTForDepthEstimation(DPTConfig.from_dict(config))
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    checker: torch.nn.Module = StableDiffusionSafetyChecker(CLIPConfig.from_dict(config))
    return checker


def _assign(
    module: torch.nn.Module, component: str, weights: Weights, stored: Mapping[str, Place]
) -> None:
    """Give ``module`` its weights; ``stored`` maps today's names to their places."""
    wanted = {n: like for n, like in module.state_dict().items() if not _NO_WEIGHTS.search(n)}
    missing = [name for name in wanted if name not in stored]
    unused = re.compile(f"{_POSITION_IDS.pattern}|{_NO_WEIGHTS.pattern}")
    unknown = [name for name in stored if name not in wanted and not unused.search(name)]
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


def _computed(owner: torch.nn.Module, name: str, like: torch.Tensor) -> torch.Tensor:
    """What a model computes and does not store: positions, or the kernel of a resampler."""
    if name == "position_ids":
        return torch.arange(like.shape[-1]).expand(like.shape)
    kernel: torch.Tensor = getattr(type(owner)(), name)
    return kernel


def _read(weights: Weights, place: Place, component: str) -> torch.Tensor:
    name = place.name
    try:
        tensor = weights.tensor(place)
    except (OSError, RuntimeError, ValueError) as error:
        raise _error(component, f"{name} cannot be read: {error}", "Download it again.") from error
    if not tensor.is_floating_point():
        raise _error(component, f"{name} is {tensor.dtype}", "Use weights in fp32, fp16 or bf16.")
    return tensor.to(torch.float32, copy=True).contiguous()


def _todays_name(name: str, component: str) -> str:
    if component == "text_encoder":  # the second has a projection beside its text_model
        name = _TEXT_PREFIX.sub("", name)
    name = _VISION_PREFIX.sub("vision_model.", name)
    return _OLD_ATTENTION_NAME.sub(lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name)


def clip_tokenizer(checkpoint: Checkpoint, text_encoder: str) -> Any:
    """A tokenizer of transformers, with the tokens of the checkpoint's embeddings."""
    tokenizer = _own_tokenizer(checkpoint, text_encoder)
    add_tokens(tokenizer, checkpoint.embeddings_of(text_encoder))
    return tokenizer


def _own_tokenizer(checkpoint: Checkpoint, text_encoder: str) -> Any:
    from transformers import CLIPTokenizer

    length = checkpoint.max_prompt_tokens
    try:
        with quiet():
            if checkpoint.single_file:
                vocabulary, merges = clip_vocabulary()
                open_clip = checkpoint.configs[text_encoder].get("hidden_act") == "gelu"
                return CLIPTokenizer(
                    vocab=vocabulary,
                    merges=merges,  # type: ignore[arg-type]  # what the call takes is pairs
                    model_max_length=length,
                    pad_token=PAD_TOKEN if open_clip else "<|endoftext|>",
                )
            return CLIPTokenizer.from_pretrained(
                str(checkpoint.tokenizers[text_encoder].absolute()), model_max_length=length
            )
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # `tokenizers` raises bare Exception
        raise _error(
            TOKENIZER_FOLDERS[text_encoder],
            f"cannot be read: {error}",
            "Download the checkpoint again.",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' advice to developers out of the user's terminal."""
    import diffusers  # noqa: F401  (as they are imported, their loggers' levels are set anew)
    import transformers  # noqa: F401

    with quiet_loggers("diffusers", "transformers"):
        # of old scheduler configs, which it then corrects, and of what it then leaves out
        warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
        warnings.filterwarnings("ignore", "In CPU autocast", category=UserWarning)
        yield


def _error(component: str, message: str, hint: str) -> ExportError:
    return ExportError(message, hint, component=component, stage="load")
