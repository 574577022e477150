"""Stable Diffusion XL and its refiner, against diffusers' own pipelines of each task."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sd_engines.errors import ConfigError
from sd_engines.spec import Defaults
from sd_export.triton import write_model_repository
from sd_runtime import Request
from sd_runtime.plan import plan
from sd_runtime.schedule import schedule_of
from sd_runtime.task import plainest_request, tasks_of

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import TinyModel

# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

ROWS, COLUMNS = np.mgrid[:16, :16]
PICTURE = np.stack([ROWS * 15, COLUMNS * 15, 255 - ROWS * 7], axis=-1).astype(np.uint8)
MASK = ((ROWS + COLUMNS > 18) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    "request_",
    [
        Request("a red circle!", seed=7, num_inference_steps=4),
        Request("a cat", negative_prompt="", seed=7, num_inference_steps=2),  # "" is not None here
        Request(("a cat", "", "a dog"), negative_prompt="red!", seed=3, num_inference_steps=2),
        Request("a red circle", seed=7, num_inference_steps=1, guidance_scale=0),
        Request("a cat", seed=5, num_inference_steps=4, image=PICTURE, strength=0.6),
        Request("a cat", seed=5, num_inference_steps=5, image=PICTURE),
        Request("a cat", seed=5, num_inference_steps=3, image=PICTURE, mask=MASK),
        Request("a dog", seed=1, num_inference_steps=3, image=PICTURE, mask=MASK, strength=1.0),
    ],
    ids=[
        *("text", "an empty negative prompt", "a second batch", "turbo"),
        *("image", "image by default", "inpainting by default", "inpainting"),
    ],
)
def test_xl_draws_as_diffusers(xl_model: TinyModel, request_: Request) -> None:
    if request_.guidance_scale is None:  # which in diffusers is another for inpainting
        request_ = replace(request_, guidance_scale=5.0)
    xl_model.assert_same(request_)


def test_xl_is_data_of_the_bundle(xl_model: TinyModel) -> None:
    manifest = xl_model.pipeline.bundle.manifest
    model, unet = manifest.model, manifest.components["unet"]
    assert model.family == "stable-diffusion-xl"
    assert model.defaults == Defaults(50, 5.0, strength=0.3, inpainting_strength=0.9999)
    assert model.force_zeros_for_empty_prompt
    assert [spec.name for spec in unet.inputs[3:]] == ["pooled_prompt_embeds", "time_ids"]
    assert unet.inputs[2].shape == ("batch", 77, 16 + 32)
    assert set(xl_model.pipeline.engines) == {
        *("text_encoder", "text_encoder_2", "unet", "vae_decoder"),
        *(("vae_encoder",) if "vae_encoder" in xl_model.pipeline.engines else ()),
    }
    planned = plan(Request("a cat"), manifest)
    assert (planned.num_inference_steps, planned.guidance_scale) == (50, 5.0)
    assert planned.request.negative_prompt is None
    np.testing.assert_array_equal(planned.unet_inputs["time_ids"], [[16, 16, 0, 0, 16, 16]])


def test_no_negative_prompt_is_kept_apart_from_an_empty_one(xl_model: TinyModel) -> None:
    silent = Request("a cat", seed=0, num_inference_steps=1)
    result = xl_model.pipeline.generate(silent)
    (recipe,) = result.recipes
    assert recipe.negative_prompt is None
    again = xl_model.pipeline.generate(recipe.request())
    np.testing.assert_array_equal(again.latents, result.latents)
    both = Request(("a cat",) * 2, negative_prompt=(None, ""), seed=(0, 0), num_inference_steps=1)
    latents = xl_model.pipeline.generate(both).latents
    np.testing.assert_array_equal(latents[0], result.latents[0])
    assert not np.array_equal(latents[1], latents[0])


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_refiner_draws_as_diffusers(refiner_model: TinyModel, strength: float) -> None:
    request = Request(
        "a red circle!", seed=2, num_inference_steps=4, image=PICTURE, strength=strength
    )
    refiner_model.assert_same(request)
    planned = plan(request, refiner_model.pipeline.bundle.manifest)
    np.testing.assert_array_equal(planned.unet_inputs["time_ids"], [[16, 16, 0, 0, 6]])
    np.testing.assert_array_equal(planned.negative_unet_inputs["time_ids"], [[16, 16, 0, 0, 2.5]])
    assert planned.request.negative_prompt == ""  # whose own words are not None but empty


def test_refiner_does_not_begin_a_picture(refiner_model: TinyModel) -> None:
    with pytest.raises(ConfigError, match="is a refiner") as caught:
        refiner_model.pipeline.stream(Request("a cat"))
    assert "--image PICTURE" in caught.value.hint
    manifest = refiner_model.pipeline.bundle.manifest
    assert tasks_of(manifest) == ("image-to-image", "inpainting")
    assert plan(plainest_request(manifest), manifest).task.name == "image-to-image"


def test_what_reads_one_text_encoder_is_refused_by_name(
    xl_model: TinyModel, refiner_model: TinyModel, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="and the bundle is of XL"):
        write_model_repository(xl_model.bundle, tmp_path / "models", backend=None)
    schedule = schedule_of(xl_model.pipeline.bundle.manifest, num_inference_steps=2)
    assert schedule["unet_inputs"] == {"time_ids": [16, 16, 0, 0, 16, 16]}
    with pytest.raises(ConfigError, match="a refiner has no schedule"):
        schedule_of(refiner_model.pipeline.bundle.manifest)
