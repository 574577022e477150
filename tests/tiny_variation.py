"""Tiny random checkpoints that read pictures in the place of prompts."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from tiny import CLIP_PROCESSOR, change_json, make_checkpoint, seeded

if TYPE_CHECKING:
    from pathlib import Path

PROCESSOR: dict[str, Any] = {**CLIP_PROCESSOR, "image_processor_type": "CLIPFeatureExtractor"}


def make_variation_checkpoint(
    folder: Path, *, seed: int = 0, cross_attention_dim: int = 8, **options: Any
) -> Path:
    """`make_checkpoint` with an image encoder in the place of the text encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    make_checkpoint(folder, seed=seed, cross_attention_dim=cross_attention_dim, **options)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    with seeded(seed):
        CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=28,
                patch_size=7,
                projection_dim=cross_attention_dim,
                initializer_factor=20.0,
            )
        ).save_pretrained(folder / "image_encoder")
    (folder / "feature_extractor").mkdir(exist_ok=True)
    processor = folder / "feature_extractor" / "preprocessor_config.json"
    processor.write_text(json.dumps(PROCESSOR))
    change_json(
        folder / "model_index.json",
        *("text_encoder", "tokenizer"),
        _class_name="StableDiffusionImageVariationPipeline",
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    return folder
