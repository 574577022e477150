"""Cached features: pictures against diffusers' own pipeline with hooks on its UNet."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from deep_cache import deep_features_kept
from sd_runtime import Pipeline, Request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import TinyModel

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For torch: on tiny tensors more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def pipeline(request: pytest.FixtureRequest, cached_bundle: Path) -> Iterator[Pipeline]:
    """Of the same checkpoint as ``tiny_model``."""
    pytest.importorskip(request.param, reason="needs the extra sd-toolkit[cpu]")
    with Pipeline.load(cached_bundle, backend=request.param, threads=1) as pipeline:
        yield pipeline


def expected(oracle: Any, request: Request, *, num_rows: int) -> tuple[np.ndarray, list[bool]]:
    """Final latents by diffusers' pipeline, and which of its UNet calls were whole ones.

    Guidance starts and stops as diffusers' documentation of its callbacks does it.
    """
    request = replace(request, guidance_scale=request.guidance_scale or 7.5)
    guided = request.guided_rows(num_rows)
    with torch.no_grad(), deep_features_kept(oracle.unet, interval=request.cache_interval) as whole:
        positive, negative = oracle.encode_prompt(
            list(request.prompts), torch.device("cpu"), request.num_images_per_prompt, True
        )
        latents = torch.empty(0)

        def on_step_end(pipe: Any, step: int, _timestep: object, tensors: dict[str, Any]) -> Any:
            nonlocal latents
            latents = tensors["latents"]
            pipe._guidance_scale = request.guidance_scale if step + 1 in guided else 0
            both = [negative, positive] if step + 1 in guided else [positive]
            return {"prompt_embeds": torch.cat(both)}

        oracle(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            generator=[torch.Generator("cpu").manual_seed(i.seed) for i in request.images()],
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale if 0 in guided else 0,
            callback_on_step_end=on_step_end,
            output_type="latent",
        )
    assert len(whole) == num_rows
    return latents.numpy(), whole


@pytest.mark.parametrize(
    ("interval", "guidance"),
    [
        (2, {}),
        (3, {"guidance_scale": 1.0}),
        (3, {"guidance_stop": 0.5}),
        (2, {"guidance_start": 0.3, "guidance_stop": 0.7}),
        (2, {"guidance_start": 0.1, "guidance_stop": 0.2}),
        (100, {"guidance_start": 0.3, "guidance_stop": 0.7}),
    ],
    ids=str,
)
def test_same_picture_as_diffusers_with_kept_features(
    tiny_model: TinyModel, pipeline: Pipeline, interval: int, guidance: dict[str, float]
) -> None:
    request = Request(
        ("a cat", "a dog"), seed=7, num_inference_steps=9, cache_interval=interval, **guidance
    )
    reference, whole = expected(tiny_model.oracle, request, num_rows=10)  # PNDM's tenth
    result = pipeline.generate(request)
    assert result.request.shallow_rows(10) == {row for row in range(10) if not whole[row]}
    assert len(result.timings.runs_ms("unet")) == sum(whole)
    assert len(result.timings.runs_ms("unet_shallow")) == 10 - sum(whole)
    assert np.linalg.norm(result.latents - reference) <= 1e-4 * np.linalg.norm(reference)
    with torch.no_grad():
        oracle = tiny_model.oracle
        latents = torch.from_numpy(reference) / oracle.vae.config.scaling_factor
        pixels = oracle.image_processor.postprocess(oracle.vae.decode(latents).sample, "np")
    assert (np.abs(np.round(255 * pixels) - result.pixels) <= 1).mean() >= 0.999


@pytest.mark.parametrize(
    "options",
    [
        {"cache_interval": 2},
        {"cache_interval": 3, "guidance_scale": 1.0, "height": 24, "width": 16},
        {"cache_interval": 2, "image": PICTURE, "strength": 0.7},
    ],
    ids=["text", "another size", "image"],
)
def test_xl_draws_as_diffusers_with_kept_features(
    sized_model: TinyModel, options: dict[str, Any]
) -> None:
    request = Request(("a cat", "a dog"), seed=7, num_inference_steps=7, **options)
    unet = sized_model.oracle.components["unet"]
    with deep_features_kept(unet, interval=request.cache_interval) as whole:
        sized_model.assert_same(request)
    timings = sized_model.pipeline.generate(request).timings
    assert len(timings.runs_ms("unet")) == sum(whole)
    assert len(timings.runs_ms("unet_shallow")) == len(whole) - sum(whole) > 0


def test_no_features_of_another_batch(tiny_model: TinyModel, pipeline: Pipeline) -> None:
    request = Request(
        ("a cat", "a dog", "a horse"), seed=9, num_inference_steps=4, cache_interval=3
    )
    reference, _ = expected(tiny_model.oracle, request, num_rows=5)
    for _ in range(2):  # batches of two and of one, each in the buffers of the one before
        latents = pipeline.generate(request).latents
        assert np.linalg.norm(latents - reference) <= 1e-4 * np.linalg.norm(reference)


@pytest.mark.parametrize("scheduler", [None, "euler_a"])
def test_an_interval_of_one_is_the_same_as_no_cache(
    tiny_model: TinyModel, cached_bundle: Path, scheduler: str | None
) -> None:
    request = Request(("a cat", "a dog"), seed=7, num_inference_steps=4, scheduler=scheduler)
    without = tiny_model.pipeline.generate(request)
    with Pipeline.load(cached_bundle, backend="onnxruntime", threads=1) as pipeline:
        result = pipeline.generate(replace(request, cache_interval=1))
    np.testing.assert_array_equal(result.pixels, without.pixels)
    np.testing.assert_array_equal(result.latents, without.latents)
    assert "unet_shallow" not in result.timings.spans


def test_the_recipe_of_a_cached_picture_draws_it_again(pipeline: Pipeline) -> None:
    request = Request("a cat", seed=9, num_inference_steps=4, cache_interval=2)
    result = pipeline.generate(request)
    (recipe,) = result.recipes
    assert "Cache interval: 2" in recipe.parameters()
    again = pipeline.generate(recipe.request())
    np.testing.assert_array_equal(again.pixels, result.pixels)
    exact = pipeline.generate(replace(request, cache_interval=1))
    assert (exact.pixels != result.pixels).mean() > 0.1
