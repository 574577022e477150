"""Checkpoints of Safe Stable Diffusion, which bring a safety checker of their own class."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.deprecated.stable_diffusion_safe.safety_checker import (
    SafeStableDiffusionSafetyChecker,
)
from PIL import Image

from safe import safe_expected, safe_pipeline
from sd_export import export
from sd_runtime import Pipeline, Request
from tiny import SMALLEST, make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # schedulers, of numpy
    pytest.mark.filterwarnings("ignore:The decode_latents method:FutureWarning"),
]


REQUESTS = [
    Request("a cat", seed=seed, num_inference_steps=2, safety_guidance="max") for seed in range(4)
]


def divide(pictures: list[np.ndarray], checker: Any, parts: dict[str, Any]) -> None:
    """Set the thresholds of ``checker`` so that it flags some of the ``pictures``, not all."""
    images = [Image.fromarray(picture) for picture in pictures]
    with torch.no_grad():
        pixels = parts["feature_extractor"](images, return_tensors="pt").pixel_values
        embeds = checker.visual_projection(checker.vision_model(pixels)[1])
        scores = torch.cosine_similarity(embeds, checker.concept_embeds[:1]).sort().values
        widest = int(scores.diff().argmax())
        checker.concept_embeds_weights.fill_(2.0)  # above any cosine
        checker.special_care_embeds_weights.fill_(2.0)
        checker.concept_embeds_weights[0] = scores[widest : widest + 2].mean()


def test_safe_checkpoint_draws_and_checks_as_its_own_pipeline(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path / "safe",
        safety_checker=True,
        sample_size=16,
        **SMALLEST,
    )
    parts = StableDiffusionPipeline.from_pretrained(folder).components
    checker = SafeStableDiffusionSafetyChecker(parts["safety_checker"].config)
    checker.load_state_dict(parts["safety_checker"].state_dict())
    oracle = safe_pipeline({**parts, "safety_checker": None})
    divide([safe_expected(oracle, request)[0][0] for request in REQUESTS], checker, parts)
    checker.eval().save_pretrained(folder / "safety_checker")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPipelineSafe"
    index["safety_checker"] = ["stable_diffusion_safe", "SafeStableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    export(folder, tmp_path / "bundle")

    oracle = safe_pipeline({**parts, "safety_checker": checker})
    flags = []
    with Pipeline.load(tmp_path / "bundle", threads=1) as pipeline:
        for request in REQUESTS:
            pixels, latents = safe_expected(oracle, request)
            flags.append(bool((pixels == 0).all()))  # its own list keeps but the last flag
            result = pipeline.generate(request)
            assert result.nsfw_content_detected == (flags[-1],)
            assert np.linalg.norm(result.latents - latents) <= 1e-4 * np.linalg.norm(latents)
            assert (np.abs(result.pixels.astype(int) - pixels) <= 1).mean() >= 0.999
    assert {*flags} == {True, False}
