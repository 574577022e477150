"""Tiny random Stable Diffusion checkpoints, made of the unmodified classes of their authors.

Weights are random, shapes small, layout and file names as on the Hub. The VAE's factor is 8 and
the latents are 8×8 unless asked otherwise, so pictures are 64×64.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MAX_TOKENS = 77
WORDS = (
    "a an the red green blue yellow circle square triangle large small on of and in with painting "
    "photo left right above below black white background cat dog astronaut riding horse"
)


SMALLEST: dict[str, Any] = {
    "block_out_channels": (8,),
    "vae_block_out_channels": (8,),
    "cross_attention_dim": 8,
    "attention_heads": 2,
    "norm_num_groups": 4,
    "text_layers": 1,
}
"""What makes a checkpoint of one level, whose pictures are its latents' size: fastest to export."""
CLIP_PROCESSOR: dict[str, Any] = {
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 28},
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from ``seed``, and go on afterwards as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def change_json(path: Path, *without: str, **changes: Any) -> None:
    """Set fields of a JSON file, and take those of the names ``without`` out of it."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in without}, indent=2))


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in CLIP's order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    kept += range(ord("®"), ord("ÿ") + 1)
    rest = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + n) for n in range(len(rest))]


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A small vocabulary and its merges in the order and form of CLIP's own."""
    trained = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator([WORDS] * 4, trainer)
    merges = [(left, right) for left, right in json.loads(trained.to_str())["model"]["merges"]]
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    tokens = list(dict.fromkeys(tokens))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


Vocabulary: TypeAlias = tuple[dict[str, int], list[tuple[str, str]]]


def save_tokenizer(
    folder: Path,
    *,
    form: Literal["tokenizer.json", "vocab.json"],
    pad_token: str = "<|endoftext|>",  # noqa: S107  (as Stable Diffusion v1 pads)
    vocabulary: Vocabulary | None = None,
) -> int:
    """Write a CLIP tokenizer in one of the two forms on the Hub; its vocabulary size.

    A small one, where no ``vocabulary`` with its merges is given.
    """
    from transformers import CLIPTokenizer

    tokens, merges = clip_vocabulary() if vocabulary is None else vocabulary
    tokenizer = CLIPTokenizer(
        vocab=tokens, merges=merges, model_max_length=MAX_TOKENS, pad_token=pad_token
    )
    tokenizer.save_pretrained(folder)
    if form == "vocab.json":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False))
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n")
        (folder / "special_tokens_map.json").write_text(
            json.dumps(
                {
                    "bos_token": "<|startoftext|>",
                    "eos_token": "<|endoftext|>",
                    "pad_token": pad_token,
                    "unk_token": "<|endoftext|>",
                }
            )
        )
    return len(tokens)


def make_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon",
    scheduler: str = "PNDMScheduler",
    safety_checker: bool = False,
    tokenizer: Literal["tokenizer.json", "vocab.json"] = "tokenizer.json",
    text_model_prefix: bool = False,
    variant: str | None = None,
    sample_size: int = 8,
    block_out_channels: tuple[int, ...] = (32, 64),
    vae_block_out_channels: tuple[int, ...] = (8, 8, 16, 16),
    cross_attention_dim: int = 32,
    attention_heads: int = 4,
    norm_num_groups: int = 8,
    layers_per_block: int = 1,
    text_layers: int = 2,
    v2: bool = False,
    time_cond_proj_dim: int | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
    inpainting: bool = False,
    in_channels: int | None = None,
) -> Path:
    """Save a random checkpoint in the diffusers layout under ``folder`` and return ``folder``.

    ``text_model_prefix`` writes the text encoder's keys as older transformers did; ``tokenizer``
    picks the tokenizer's form. ``v2`` makes what Stable Diffusion 2 made otherwise, with heads of
    ``attention_heads`` channels; ``time_cond_proj_dim`` a latent consistency model; ``inpainting``
    gives the UNet nine channels, ``in_channels`` another number. The same arguments give the same
    weights.
    """
    import diffusers
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary_size = save_tokenizer(
        folder / "tokenizer",
        form=tokenizer,
        pad_token="!" if v2 else "<|endoftext|>",
        vocabulary=vocabulary,
    )
    with seeded(seed):
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary_size,
                hidden_size=cross_attention_dim,
                intermediate_size=2 * cross_attention_dim,
                num_hidden_layers=text_layers,
                num_attention_heads=cross_attention_dim // attention_heads if v2 else 2,
                hidden_act="gelu" if v2 else "quick_gelu",
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=vocabulary_size - 2,
                eos_token_id=vocabulary_size - 1,
                initializer_factor=2.0,
            )
        )
        deep = len(block_out_channels) - 1
        unet = diffusers.UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=in_channels or (9 if inpainting else 4),
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            down_block_types=("CrossAttnDownBlock2D",) * deep + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * deep,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=[n // attention_heads for n in block_out_channels]
            if v2
            else attention_heads,
            use_linear_projection=v2,
            upcast_attention=v2,
            time_cond_proj_dim=time_cond_proj_dim,
            norm_num_groups=norm_num_groups,
        )
        levels = len(vae_block_out_channels)
        vae = diffusers.AutoencoderKL(
            sample_size=sample_size * 2 ** (levels - 1),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=vae_block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=min(norm_num_groups, min(vae_block_out_channels)),
        )
        if safety_checker:
            _save_safety_checker(folder)

    text_encoder.save_pretrained(folder / "text_encoder", variant=variant)
    unet.save_pretrained(folder / "unet", variant=variant)
    vae.save_pretrained(folder / "vae", variant=variant)
    if text_model_prefix:
        path = next((folder / "text_encoder").glob("*.safetensors"))
        tensors = {f"text_model.{key}": value for key, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    options: dict[str, Any] = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    getattr(diffusers, scheduler)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type=prediction_type,
        steps_offset=1,
        **{**options, **(scheduler_options or {})},
    ).save_pretrained(folder / "scheduler")
    model_index = {
        "_class_name": "LatentConsistencyModelPipeline"
        if time_cond_proj_dim
        else f"StableDiffusion{'Inpaint' if inpainting else ''}Pipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": ["transformers", "CLIPImageProcessor"]
        if safety_checker
        else [None] * 2,
        "requires_safety_checker": safety_checker,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]
        if safety_checker
        else [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(model_index, indent=2))
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n\n# Tiny\n")
    return folder


def make_smallest_checkpoint(folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """A checkpoint of the `SMALLEST` shape, but for ``options``."""
    return make_checkpoint(folder, seed=seed, **{**SMALLEST, **options})


def make_tiny_vae(folder: Path, *, levels: int = 1, latent_channels: int = 4) -> Path:
    """Save a random `AutoencoderTiny`, whose pictures are 2^(levels - 1) times their latents."""
    import diffusers

    with seeded(7):
        vae = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,) * levels,
            decoder_block_out_channels=(8,) * levels,
            num_encoder_blocks=(1,) * levels,
            num_decoder_blocks=(1,) * levels,
            latent_channels=latent_channels,
        )
    vae.save_pretrained(folder)
    return folder


def _save_safety_checker(folder: Path) -> None:
    """A random checker whose thresholds let about half of all random pictures through."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    checker = StableDiffusionSafetyChecker(
        CLIPConfig(
            text_config={"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            projection_dim=16,
        )
    )
    with torch.no_grad():
        checker.concept_embeds.copy_(torch.randn_like(checker.concept_embeds))
        checker.special_care_embeds.copy_(torch.randn_like(checker.special_care_embeds))
        checker.concept_embeds_weights.fill_(0.29)
        checker.special_care_embeds_weights.fill_(0.26)
    checker.save_pretrained(folder / "safety_checker")
    (folder / "feature_extractor").mkdir(exist_ok=True)
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(
        json.dumps(CLIP_PROCESSOR)
    )
