"""Tiny random checkpoints that read pictures in the place of prompts."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch

from tiny import make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

PROCESSOR: dict[str, Any] = {
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPFeatureExtractor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 28},
}


def make_variation_checkpoint(
    folder: Path, *, seed: int = 0, cross_attention_dim: int = 8, **options: Any
) -> Path:
    """`make_checkpoint` with an image encoder in the place of the text encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    make_checkpoint(folder, seed=seed, cross_attention_dim=cross_attention_dim, **options)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
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
    finally:
        torch.set_rng_state(state)
    (folder / "feature_extractor").mkdir(exist_ok=True)
    processor = folder / "feature_extractor" / "preprocessor_config.json"
    processor.write_text(json.dumps(PROCESSOR))
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["_class_name"] = "StableDiffusionImageVariationPipeline"
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    del index["text_encoder"], index["tokenizer"]
    path.write_text(json.dumps(index, indent=2))
    return folder
