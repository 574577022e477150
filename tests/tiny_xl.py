"""Tiny random Stable Diffusion XL checkpoints, made of the unmodified classes of their authors.

As `tiny`, with what XL made otherwise: two text encoders, of which the second pools the prompt, a
UNet that is told sizes, blocks of several transformer layers. Scheduler and padding are XL's own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tiny import MAX_TOKENS, Vocabulary, save_tokenizer, seeded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def make_xl_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    refiner: bool = False,
    inpainting: bool = False,
    sample_size: int = 8,
    block_out_channels: tuple[int, ...] = (16, 32),
    vae_block_out_channels: tuple[int, ...] = (8, 8),
    text_width: int = 16,
    text_layers: int = 2,
    projection_dim: int = 24,
    time_embed_dim: int = 8,
    head_size: int = 8,
    norm_num_groups: int = 8,
    layers_per_block: int = 1,
    transformer_layers: int = 1,
    scheduler: str = "EulerDiscreteScheduler",
    scheduler_options: Mapping[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Path:
    """Save a random checkpoint in the diffusers layout under ``folder`` and return ``folder``.

    ``refiner`` makes one with the second text encoder alone and an aesthetic score; ``inpainting``
    gives the UNet nine channels. The same arguments give the same weights.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder.mkdir(parents=True, exist_ok=True)
    encoders = ("text_encoder_2",) if refiner else ("text_encoder", "text_encoder_2")
    widths = {"text_encoder": text_width, "text_encoder_2": 2 * text_width}
    models: dict[str, Any] = {}
    with seeded(seed):
        for name in encoders:
            second = name == "text_encoder_2"
            vocabulary_size = save_tokenizer(
                folder / name.replace("text_encoder", "tokenizer"),
                form="vocab.json",
                pad_token="!" if second else "<|endoftext|>",
                vocabulary=vocabulary,
            )
            kind = CLIPTextModelWithProjection if second else CLIPTextModel
            models[name] = kind(
                CLIPTextConfig(
                    vocab_size=vocabulary_size,
                    hidden_size=widths[name],
                    intermediate_size=2 * widths[name],
                    num_hidden_layers=text_layers,
                    num_attention_heads=widths[name] // head_size,
                    hidden_act="gelu" if second else "quick_gelu",
                    max_position_embeddings=MAX_TOKENS,
                    projection_dim=projection_dim,
                    bos_token_id=0,  # as in XL's configs: the highest id ends a text, then
                    eos_token_id=2,
                    initializer_factor=2.0,
                )
            )
        deep = len(block_out_channels) - 1
        attends = [False] + [True] * deep
        if refiner and deep:
            attends[-1] = False
        models["unet"] = diffusers.UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=9 if inpainting else 4,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
            transformer_layers_per_block=[1] + [transformer_layers] * deep,
            cross_attention_dim=sum(widths[name] for name in encoders),
            attention_head_dim=[channels // head_size for channels in block_out_channels],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_embed_dim,
            projection_class_embeddings_input_dim=projection_dim
            + time_embed_dim * (5 if refiner else 6),
            norm_num_groups=norm_num_groups,
        )
        levels = len(vae_block_out_channels)
        models["vae"] = diffusers.AutoencoderKL(
            sample_size=sample_size * 2 ** (levels - 1),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=vae_block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=min(norm_num_groups, min(vae_block_out_channels)),
            scaling_factor=0.13025,
            force_upcast=True,
        )

    for name, model in models.items():
        model.save_pretrained(folder / name)
    getattr(diffusers, scheduler)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        steps_offset=1,
        **({"timestep_spacing": "leading"} | dict(scheduler_options or {})),
    ).save_pretrained(folder / "scheduler")
    task = "Img2Img" if refiner else "Inpaint" if inpainting else ""
    parts: dict[str, Any] = {
        name: ["transformers", type(models[name]).__name__] if name in models else [None, None]
        for name in ("text_encoder", "text_encoder_2")
    }
    parts |= {
        name.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"]
        if name in models
        else [None, None]
        for name in ("text_encoder", "text_encoder_2")
    }
    model_index = {
        "_class_name": f"StableDiffusionXL{task}Pipeline",
        "_diffusers_version": diffusers.__version__,
        "force_zeros_for_empty_prompt": not refiner,
        **({"requires_aesthetics_score": True} if refiner else {}),
        **parts,
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(model_index, indent=2))
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n\n# Tiny\n")
    return folder
