"""Tiny random checkpoints of Stable Diffusion 2 depth to image, estimator included."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from tiny import change_json, make_checkpoint, seeded

if TYPE_CHECKING:
    from pathlib import Path

LARGE: dict[str, Any] = {
    "patch_size": 8,
    "reassemble_factors": [4, 2, 1, 0.5],
    "neck_hidden_sizes": [8, 8, 8, 8],
}
"""As Intel/dpt-large: a vision transformer alone."""
HYBRID: dict[str, Any] = {
    "is_hybrid": True,
    "patch_size": 16,
    "backbone_config": {
        "model_type": "bit",
        "global_padding": "same",
        "layer_type": "bottleneck",
        "depths": [1, 1, 1],
        "hidden_sizes": [8, 16, 128],
        "embedding_size": 8,
        "num_groups": 2,
        "out_features": ["stage1", "stage2", "stage3"],
        "embedding_dynamic_padding": True,
    },
    "backbone_featmap_shape": [1, 128, 2, 2],
    "backbone_out_indices": [0, 1, 1, 2],
    "reassemble_factors": [1, 1, 1, 0.5],
    "neck_hidden_sizes": [8, 16, 8, 8],
    "neck_ignore_stages": [0, 1],
}
"""As Intel/dpt-hybrid-midas, which Stable Diffusion 2 depth has: one behind a BiT."""
PROCESSOR: dict[str, Any] = {
    "do_normalize": True,
    "do_resize": True,
    "ensure_multiple_of": 1,
    "feature_extractor_type": "DPTFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "keep_aspect_ratio": False,
    "resample": 2,
    "size": 32,
}
"""As the Hub has it."""


def make_depth_checkpoint(
    folder: Path, *, estimator: dict[str, Any] = HYBRID, seed: int = 0, **options: Any
) -> Path:
    """`make_checkpoint` with five channels, and with an ``estimator`` of that config."""
    make_checkpoint(folder, in_channels=5, seed=seed, **options)
    make_estimator(estimator, seed=seed).save_pretrained(folder / "depth_estimator")
    (folder / "feature_extractor").mkdir()
    processor = folder / "feature_extractor" / "preprocessor_config.json"
    processor.write_text(json.dumps(PROCESSOR))
    change_json(
        folder / "model_index.json",
        *("safety_checker", "requires_safety_checker"),
        _class_name="StableDiffusionDepth2ImgPipeline",
        depth_estimator=["transformers", "DPTForDepthEstimation"],
        feature_extractor=["transformers", "DPTImageProcessor"],
    )
    return folder


def make_estimator(config: dict[str, Any], *, seed: int = 0) -> torch.nn.Module:
    """A random estimator that finds depths in noise, none of them 0, from pictures of 32×32."""
    from transformers import DPTConfig, DPTForDepthEstimation

    common = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "backbone_out_indices": [0, 1, 2, 3],
        "fusion_hidden_size": 8,
    }
    with seeded(seed):
        estimator = DPTForDepthEstimation(DPTConfig(**{**common, **config}))
        with torch.no_grad():
            for parameter in estimator.parameters():
                if parameter.ndim > 1:
                    fan_in = parameter[0].numel()
                    parameter.normal_(std=(2 / fan_in) ** 0.5)
            estimator.head.head[4].weight.abs_()
    return estimator.eval()
