"""Upscalers: the picture of diffusers' own pipeline, and what no one else can tell of tiles."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from pictures import recipe_in
from sd_engines.errors import BundleError, ConfigError
from sd_engines.manifest import SizeEntry
from sd_engines.spec import Defaults
from sd_export.triton import write_model_repository
from sd_runtime import Request
from sd_runtime.cli import main
from sd_runtime.embed.context import Context
from sd_runtime.plan import plan
from sd_runtime.recipe import recipes_from_text, text_from_recipes
from sd_runtime.schedule import schedule_of
from sd_runtime.task import plainest_request, tasks_of

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import TinyModel, TinyUpscaler

# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

ROWS, COLUMNS = np.mgrid[:13, :20]
LARGE = np.stack([ROWS * 19, COLUMNS * 12, 255 - ROWS * 9], axis=-1).astype(np.uint8)
PICTURE = LARGE[:8, :8]  # of the profile's size


@pytest.mark.parametrize(
    "request_",
    [
        Request("a red circle", seed=7, image=PICTURE),
        Request("a cat", seed=5, image=PICTURE, num_inference_steps=4, noise_level=0),
        Request("a cat", seed=5, image=PICTURE, num_inference_steps=4, noise_level=350),
        Request(
            ("a cat", "", "a dog"),
            negative_prompt="red!",
            seed=3,
            image=PICTURE,
            num_inference_steps=3,
            guidance_scale=3,
        ),
        Request("a cat", seed=1, image=PICTURE, num_inference_steps=3, guidance_scale=1),
        Request("a cat", seed=1, image=PICTURE, num_inference_steps=4, scheduler="euler_a"),
        Request("a cat", seed=1, image=PICTURE, num_inference_steps=4, scheduler="ddim", eta=0.5),
    ],
    ids=["defaults", "no noise", "most noise", "a second batch", "unguided", "euler_a", "eta"],
)
def test_upscaler_draws_as_diffusers(upscaler_model: TinyUpscaler, request_: Request) -> None:
    upscaler_model.assert_same(request_)


def test_upscaler_is_data_of_the_bundle(upscaler_model: TinyUpscaler) -> None:
    manifest = upscaler_model.pipeline.bundle.manifest
    model = manifest.model
    assert (model.family, model.prediction_type) == ("stable-diffusion-x4-upscaler", "v_prediction")
    assert model.defaults == Defaults(num_inference_steps=75, guidance_scale=9.0)
    assert (model.max_noise_level, model.vae_scaling_factor) == (350, 0.08333)
    assert model.low_res_scheduler is not None
    assert model.low_res_scheduler["beta_start"] == 0.0001
    profile = manifest.profile
    assert (profile.height, profile.latent_height, profile.vae_scale_factor) == (32, 8, 4)
    assert set(manifest.components) == {"text_encoder", "unet", "vae_decoder"}
    low_res_image, noise_level = manifest.components["unet"].inputs[3:]
    assert (low_res_image.name, low_res_image.shape) == ("low_res_image", ("pictures", 3, 8, 8))
    assert (noise_level.name, noise_level.dtype) == ("noise_level", "int64")
    (proof,) = (entry for entry in manifest.certificate if entry.component == "end_to_end")
    assert (proof.metric, proof.figure >= 0.999) == ("pixels_within_1", True)


@pytest.fixture(params=["upscaler_model", "latent_upscaler_model"])
def upscaler(request: pytest.FixtureRequest) -> TinyUpscaler:
    """Each of those that work by tiles."""
    model: TinyUpscaler = request.getfixturevalue(request.param)
    return model


def test_the_first_tile_is_what_diffusers_makes_of_it_alone(upscaler: TinyUpscaler) -> None:
    scale = upscaler.pipeline.profile.height // len(PICTURE)
    scheduler = {4: "euler_a", 2: "euler_karras"}[scale]  # none that draws noise predicts x₀
    whole = Request("a cat", seed=5, image=LARGE, num_inference_steps=3, scheduler=scheduler)
    result = upscaler.pipeline.generate(whole)
    assert result.pixels.shape == (1, scale * 13, scale * 20, 3)
    with upscaler._scheduled(scheduler):
        pixels, latents, _ = upscaler.expected(replace(whole, image=PICTURE))
    assert np.linalg.norm(result.latents[0] - latents) <= 1e-4 * np.linalg.norm(latents)
    corner = slice(5 * scale), slice(6 * scale)  # which no other tile draws on
    differences = np.abs(result.pixels[0][corner].astype(int) - pixels[0][corner])
    assert (differences <= 1).mean() >= 0.999


def test_a_picture_does_not_depend_on_its_neighbours(upscaler: TinyUpscaler) -> None:
    options: dict[str, Any] = {"image": LARGE, "num_inference_steps": 2}
    both = upscaler.pipeline.generate(Request(("a cat", "a dog"), seed=(3, 9), **options))
    dog = upscaler.pipeline.generate(Request("a dog", seed=9, **options))
    np.testing.assert_allclose(both.latents[len(dog.latents) :], dog.latents, atol=1e-5)
    assert (np.abs(both.pixels[1].astype(int) - dog.pixels[0]) <= 1).mean() >= 0.999


def test_steps_count_tiles(upscaler_model: TinyUpscaler) -> None:
    request = Request("a cat", seed=5, image=LARGE, num_inference_steps=2)
    planned = plan(request, upscaler_model.pipeline.bundle.manifest)
    assert (planned.num_drawn, planned.num_steps(2)) == (6, 6)
    steps = list(upscaler_model.pipeline.stream(request))
    assert [step.first_image for step in steps] == [0, 0, 2, 2, 4, 4]
    assert {step.num_steps for step in steps} == {6}


def test_a_smaller_picture_comes_out_as_many_times_as_large(upscaler: TinyUpscaler) -> None:
    scale = upscaler.pipeline.profile.height // len(PICTURE)
    request = Request("a cat", seed=5, image=PICTURE[:5, :3], num_inference_steps=1)
    result = upscaler.pipeline.generate(request)
    assert result.pixels.shape == (1, scale * 5, scale * 3, 3)
    (recipe,) = result.recipes
    assert (recipe.height, recipe.width) == result.pixels.shape[1:3]
    again = upscaler.pipeline.generate(recipe.request(image=PICTURE[:5, :3]))
    np.testing.assert_array_equal(again.pixels, result.pixels)
    plain = Request("", seed=5, image=np.zeros((1, 1, 3), np.uint8), num_inference_steps=1)
    assert upscaler.pipeline.generate(plain).pixels.shape == (1, scale, scale, 3)


def test_a_picture_is_drawn_whole_where_the_bundle_has_its_size(upscaler: TinyUpscaler) -> None:
    manifest = upscaler.pipeline.bundle.manifest
    scale = manifest.profile.height // len(PICTURE)
    own = SizeEntry(**{part.name: getattr(manifest, part.name) for part in fields(SizeEntry)})
    wide = replace(own, profile=replace(own.profile, height=8 * scale, width=24 * scale))
    request = Request("a cat", image=np.zeros((8, 24, 3), np.uint8))
    assert plan(request, manifest).profile == manifest.profile
    planned = plan(request, replace(manifest, sizes=(wide,)))
    assert planned.profile == wide.profile


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": None}, "it makes a picture larger"),
        ({"mask": PICTURE[..., 0]}, "mask is not for an upscaler"),
        ({"depth_map": np.arange(4.0).reshape(2, 2)}, "depth_map is not for an upscaler"),
        ({"strength": 0.5}, "strength is not for an upscaler"),
        ({"noise_level": 351}, "knows 350 at most"),
        ({"noise_level": -1}, "noise_level is -1"),
        ({"noise_level": 2.5}, "noise_level is 2.5"),
        ({"image": None, "noise_level": 20}, "without a picture"),
        ({"height": 64}, "comes out 32×32, not 64×32"),
        ({"control_image": PICTURE}, "ControlNet"),
        ({"cache_interval": 2}, "no shallow UNet"),
    ],
)
def test_what_an_upscaler_does_not_do_is_refused(
    upscaler_model: TinyUpscaler, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        upscaler_model.pipeline.stream(Request("a cat", **{"image": PICTURE, **options}))


def test_noise_level_is_for_upscalers(tiny_model: TinyModel) -> None:
    with pytest.raises(ConfigError, match="the bundle is no upscaler's") as caught:
        tiny_model.pipeline.stream(Request("a cat", image=PICTURE, noise_level=20))
    assert "strength" in caught.value.hint


def test_a_bundle_that_does_not_say_its_noise_is_refused(upscaler_model: TinyUpscaler) -> None:
    manifest = upscaler_model.pipeline.bundle.manifest
    silent = replace(manifest, model=replace(manifest.model, low_res_scheduler=None))
    with pytest.raises(BundleError, match="what noise its UNet is shown"):
        plan(Request("a cat", image=PICTURE), silent)


def test_services_refuse_an_upscaler_before_they_open_it(
    upscaler_model: TinyUpscaler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sd_runtime.serve.cli import main as serve

    manifest = upscaler_model.pipeline.bundle.manifest
    assert tasks_of(manifest) == ("upscaling",)
    assert plan(plainest_request(manifest), manifest).task.name == "upscaling"
    with pytest.raises(ConfigError, match="is an upscaler"):
        schedule_of(manifest)
    with pytest.raises(ConfigError, match="is an upscaler"):
        Context(str(upscaler_model.bundle), threads=1, queue_size=1)
    with pytest.raises(ConfigError, match="is an upscaler"):
        write_model_repository(upscaler_model.bundle, tmp_path / "models", backend=None)
    assert serve([str(upscaler_model.bundle), "--port", "0"]) == 2
    assert "is an upscaler" in capsys.readouterr().err


def test_sd_run_makes_a_picture_larger(
    upscaler_model: TinyUpscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(LARGE).save("small.png")
    shared = [str(upscaler_model.bundle), "--image", "small.png", "--threads", "1", "--quiet"]
    options = ["--noise-level", "30", "--num-inference-steps", "2", "--seed", "5"]
    assert main([*shared, "a cat", *options, "--output", "large.png"]) == 0
    recipe = recipe_in(tmp_path / "large.png")
    assert (recipe.height, recipe.width) == (52, 80)
    assert (recipe.noise_level, recipe.strength) == (30, None)
    assert "Noise level: 30" in recipe.parameters()
    with Image.open("large.png") as image:
        drawn = np.asarray(image)
    request = Request("a cat", seed=5, image=LARGE, noise_level=30, num_inference_steps=2)
    np.testing.assert_array_equal(drawn, upscaler_model.pipeline.generate(request).pixels[0])
    assert main([*shared, "--from-image", "large.png", "--output", "again.png"]) == 0
    with Image.open("again.png") as image:
        np.testing.assert_array_equal(np.asarray(image), drawn)
    data = json.loads(text_from_recipes([recipe], columns=1))
    for wrong in ({"strength": 0.5}, {"noise_level": "30"}, {"image": None}):
        data["recipes"][0] = {**json.loads(text_from_recipes([recipe], columns=1))["recipes"][0]}
        data["recipes"][0] |= wrong
        with pytest.raises(ConfigError, match="cannot be read"):
            recipes_from_text(json.dumps(data))
