"""Real bundles of tiny random checkpoints, and diffusers' own pipeline on the same weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sd_runtime import Pipeline
from tiny import make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diffusers import StableDiffusionPipeline

    from sd_runtime import Request


@dataclass(frozen=True)
class TinyModel:
    """One checkpoint, the bundle made of it, and two pipelines that should agree."""

    checkpoint: Path
    bundle: Path
    pipeline: Pipeline
    oracle: StableDiffusionPipeline

    def expected(self, request: Request) -> tuple[np.ndarray, np.ndarray, list[bool] | None]:
        """What diffusers makes of ``request``: pixels uint8, final latents, nsfw flags."""
        import torch

        latents = []

        def keep(_pipe: object, _step: int, _timestep: object, tensors: dict[str, Any]) -> Any:
            latents.append(tensors["latents"].numpy().copy())
            return tensors

        negative = request.negative_prompt
        if isinstance(negative, str):
            negative = [negative] * len(request.prompts)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
        try:
            output = self.oracle(
                list(request.prompts),
                negative_prompt=list(negative),
                generator=[
                    torch.Generator("cpu").manual_seed(image.seed) for image in request.images()
                ],
                num_images_per_prompt=request.num_images_per_prompt,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                eta=request.eta,
                callback_on_step_end=keep,
            )
        finally:
            torch.set_num_threads(threads)
        pixels = np.stack([np.asarray(image) for image in output.images])
        return pixels, latents[-1], output.nsfw_content_detected


def make_model(
    folder: Path, *, batch_size: int, safety_checker: bool = False, **checkpoint_options: Any
) -> TinyModel:
    """Make, export and open a tiny model below ``folder``."""
    from diffusers import StableDiffusionPipeline

    from sd_export import export

    checkpoint = make_checkpoint(
        folder / "checkpoint", safety_checker=safety_checker, **checkpoint_options
    )
    bundle = folder / "bundle"
    with warnings.catch_warnings():  # diffusers says that it sets clip_sample to False, as we do
        warnings.simplefilter("ignore", FutureWarning)
        export(checkpoint, bundle, batch_size=batch_size)
        oracle = StableDiffusionPipeline.from_pretrained(checkpoint)
    oracle.set_progress_bar_config(disable=True)
    return TinyModel(checkpoint, bundle, Pipeline.load(bundle, threads=1), oracle)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """64×64 pictures, two at a time, PNDM, epsilon."""
    model = make_model(tmp_path_factory.mktemp("tiny"), batch_size=2)
    yield model
    model.pipeline.close()


@pytest.fixture(scope="session")
def guarded_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """Another shape: 48×48 pictures from a factor of 4, v_prediction, DDIM, a safety checker."""
    model = make_model(
        tmp_path_factory.mktemp("guarded"),
        batch_size=1,
        seed=2,
        safety_checker=True,
        prediction_type="v_prediction",
        scheduler="DDIMScheduler",
        sample_size=12,
        vae_block_out_channels=(8, 16, 16),
        cross_attention_dim=48,
    )
    yield model
    model.pipeline.close()
