"""Image-to-image and inpainting against the unmodified pipelines of diffusers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sd_engines.bundle import open_bundle
from sd_engines.errors import BundleError, ConfigError
from sd_runtime import Pipeline, Request
from sd_runtime.plan import plan
from sd_runtime.scheduler_defaults import DEFAULTS

if TYPE_CHECKING:
    from conftest import TinyModel

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
STEPS = 5


def picture(model: TinyModel, *, seed: int = 0) -> Image.Image:
    """Smooth colours of the bundle's size."""
    profile = model.pipeline.profile
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    size = (profile.width, profile.height)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def mask(model: TinyModel) -> Image.Image:
    """White in one corner, with an edge that no latent's border meets, and grey of both kinds."""
    profile = model.pipeline.profile
    pixels = np.zeros((profile.height, profile.width), np.uint8)
    pixels[: profile.height // 2 + 3, : profile.width // 2 + 1] = 255
    pixels[-5:, -9:] = 128
    pixels[-5:, :9] = 127
    return Image.fromarray(pixels)


def request_for(model: TinyModel, *, masked: bool, **options: Any) -> Request:
    pictures = {"image": picture(model), "mask": mask(model) if masked else None}
    defaults = {"seed": 8, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    return Request(options.pop("prompt", "a cat"), **{**pictures, **defaults, **options})


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("masked", [False, True], ids=["image", "mask"])
@pytest.mark.parametrize(
    "options",
    [
        {"scheduler": "ddim", "eta": 0.5, "negative_prompt": "red"},
        {"scheduler": "euler", "guidance_scale": 1.0},
        {"scheduler": "dpm++_2m_sde_karras", "guidance_scale": 1.0},
    ],
    ids=itertools.count(),
)
def test_every_strength(
    tiny_model: TinyModel, options: dict[str, Any], masked: bool, strength: float
) -> None:
    tiny_model.assert_same(request_for(tiny_model, masked=masked, strength=strength, **options))


@pytest.mark.parametrize("masked", [False, True], ids=["image", "mask"])
@pytest.mark.parametrize("name", DEFAULTS)
def test_every_class_of_schedulers(tiny_model: TinyModel, name: str, masked: bool) -> None:
    request = request_for(tiny_model, masked=masked, scheduler=name, strength=0.7)
    tiny_model.assert_same(request)


def test_the_graph_of_an_inpainting_checkpoint_takes_the_mask_by_name(
    inpainting_model: TinyModel,
) -> None:
    manifest = open_bundle(inpainting_model.bundle).manifest
    inputs = {spec.name: spec.shape for spec in manifest.components["unet"].inputs}
    assert inputs["sample"] == inputs["masked_image_latents"] == ("pictures", 4, 12, 12)
    assert inputs["mask"] == ("pictures", 1, 12, 12)
    assert manifest.model.latent_channels == 4
    proven = {entry.component: entry.figure for entry in manifest.certificate}
    assert proven.keys() == {*manifest.components, "end_to_end"}
    assert proven["end_to_end"] >= 0.999


@pytest.mark.parametrize("strength", [0.3, None])
@pytest.mark.parametrize("name", ["ddim", "euler_a", "unipc"])
def test_a_unet_that_is_fed_the_mask(
    inpainting_model: TinyModel, name: str, strength: float | None
) -> None:
    request = request_for(inpainting_model, masked=True, scheduler=name, strength=strength)
    inpainting_model.assert_same(request)
    inpainting_model.assert_same(replace(request, guidance_scale=1.0))


@pytest.mark.parametrize("masked", [False, True], ids=["image", "mask"])
def test_defaults_and_several_pictures(tiny_model: TinyModel, masked: bool) -> None:
    request = request_for(
        tiny_model, masked=masked, prompt=("a cat", "a dog"), num_images_per_prompt=2
    )
    tiny_model.assert_same(request)
    result = tiny_model.pipeline.generate(request)
    assert {recipe.strength for recipe in result.recipes} == {1.0 if masked else 0.8}
    alone = replace(request, prompt="a dog", seed=11, num_images_per_prompt=1)
    difference = tiny_model.pipeline.generate(alone).pixels[0].astype(int) - result.pixels[3]
    assert np.abs(difference).max() <= 1


def test_several_pictures_of_a_unet_that_is_fed_the_mask(inpainting_model: TinyModel) -> None:
    request = request_for(inpainting_model, masked=True, num_images_per_prompt=3, strength=0.5)
    inpainting_model.assert_same(request)


@pytest.mark.parametrize("masked", [False, True], ids=["image", "mask"])
def test_a_unet_that_is_told_its_guidance(consistency_model: TinyModel, masked: bool) -> None:
    request = request_for(consistency_model, masked=masked, strength=0.7, guidance_scale=8.5)
    consistency_model.assert_same(request)


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 4), (0.13, 6), (1.0, 3)])
def test_a_latent_consistency_model_takes_all_its_steps(
    consistency_model: TinyModel, strength: float, steps: int
) -> None:
    """Over what strength leaves of the timesteps that it was distilled on."""
    options = {"strength": strength, "num_inference_steps": steps}
    request = request_for(consistency_model, masked=False, **options)
    rows = [step.timestep for step in consistency_model.pipeline.stream(request)]
    assert len(rows) == steps
    assert rows[0] == 20 * int(50 * strength) - 1
    consistency_model.assert_same(request)


def test_strength_leaves_enough_of_the_distillation(consistency_model: TinyModel) -> None:
    request = request_for(consistency_model, masked=False, strength=0.1, num_inference_steps=6)
    with pytest.raises(ConfigError, match="6 steps are more than the 5 of the distillation"):
        consistency_model.pipeline.generate(request)


def test_what_the_mask_leaves_out_is_kept(tiny_model: TinyModel) -> None:
    request = request_for(tiny_model, masked=True)
    kept = np.asarray(request.mask.image)[::8, ::8] < 128
    one, two = (
        tiny_model.pipeline.generate(replace(request, prompt=prompt)).latents[0]
        for prompt in ("a cat", "a red circle")
    )
    np.testing.assert_array_equal(one[:, kept], two[:, kept])
    assert np.abs(one[:, ~kept] - two[:, ~kept]).min(axis=0).max() > 1e-3


@pytest.mark.parametrize("size", [(31, 200), (64, 64), (640, 480)])
@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P"])
def test_other_sizes_and_modes_are_brought_to_the_bundle_as_diffusers_does(
    tiny_model: TinyModel, size: tuple[int, int], mode: str
) -> None:
    from diffusers.image_processor import VaeImageProcessor

    draw = np.random.default_rng(1)
    large = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(size)
    large = large.convert(mode)
    found = request_for(tiny_model, masked=False, image=large, mask=large)
    images = VaeImageProcessor().preprocess(large.convert("RGB"), height=64, width=64)
    pixels = found.image.pixels(64, 64).transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_allclose(pixels * 2 - 1, images[0].numpy(), atol=1e-6)
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    masks = processor.preprocess(large, height=64, width=64)
    np.testing.assert_array_equal(found.mask.mask(64, 64), masks[0, 0].numpy() == 1)
    latents = torch.nn.functional.interpolate(masks, size=(8, 8))
    np.testing.assert_array_equal(found.mask.mask(64, 64)[::8, ::8], latents[0, 0].numpy() == 1)


def test_the_encoder_is_opened_when_a_picture_comes_and_a_picture_encoded_once(
    tiny_model: TinyModel,
) -> None:
    with Pipeline.load(tiny_model.bundle, threads=1) as pipeline:
        pipeline.generate(Request("a cat", seed=1, num_inference_steps=1))
        assert "vae_encoder" not in pipeline.engines
        request = request_for(tiny_model, masked=False, num_images_per_prompt=3)
        first = pipeline.generate(request).timings
        assert pipeline.engines["vae_encoder"].backend == pipeline.engines["unet"].backend
        assert len(first.runs_ms("vae_encoder")) == 1
        assert pipeline.generate(request).timings.runs_ms("vae_encoder") == []
        pipeline.forget_prompts()
        assert len(pipeline.generate(request).timings.runs_ms("vae_encoder")) == 1


@pytest.mark.parametrize("name", ["tiny_model", "inpainting_model"])
def test_what_is_kept_of_a_picture_is_for_one_mask_and_one_task(
    name: str, request: pytest.FixtureRequest
) -> None:
    model: TinyModel = request.getfixturevalue(name)
    model.pipeline.forget_prompts()
    from_noise = request_for(model, masked=True, strength=1.0)
    for changes in ({}, {"strength": 0.5}, {"mask": ImageOps.invert(mask(model))}):
        model.assert_same(replace(from_noise, **changes))


def test_previews_and_cancelling(tiny_model: TinyModel) -> None:
    steps = tiny_model.pipeline.stream(
        request_for(tiny_model, masked=True, scheduler="ddim", strength=0.8)
    )
    first = next(steps)
    assert (first.index, first.num_steps) == (0, 4)
    assert first.preview().shape == (1, 64, 64, 3)
    steps.close()
    assert next(steps, None) is None


def test_a_recipe_needs_the_picture_again(tiny_model: TinyModel) -> None:
    request = request_for(tiny_model, masked=True, strength=0.6)
    result = tiny_model.pipeline.generate(request)
    (recipe,) = result.recipes
    assert (recipe.image, recipe.mask) == (request.image.sha256, request.mask.sha256)
    assert "Denoising strength: 0.6" in recipe.parameters()
    again = recipe.request(image=request.image, mask=request.mask)
    np.testing.assert_array_equal(tiny_model.pipeline.generate(again).pixels, result.pixels)
    for missing in ({}, {"image": request.image}, {"mask": request.mask}):
        with pytest.raises(ConfigError, match="made from another, its"):
            recipe.request(**missing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "a mask without a picture"),
        ({"image": None, "mask": None, "strength": 0.5}, "strength is 0.5 without a picture"),
        ({"mask": Image.new("L", (8, 9))}, "the mask is 9×8 .height × width., its picture"),
        ({"strength": 0.0}, "leaves none to run"),
        ({"strength": 0.19}, "leaves none to run"),
        ({"strength": 1.1}, "strength is 1.1"),
        ({"strength": "1"}, "strength is '1'"),
        ({"strength": True}, "strength is True"),
    ],
)
def test_what_cannot_be_asked(tiny_model: TinyModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_model.pipeline.stream(request_for(tiny_model, masked=True, **options))


@pytest.mark.parametrize("options", [{"image": None, "mask": None}, {"mask": None}])
def test_what_a_unet_for_inpainting_refuses(
    inpainting_model: TinyModel, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="--image PICTURE --mask MASK"):
        inpainting_model.pipeline.stream(request_for(inpainting_model, masked=True, **options))


def test_a_bundle_without_an_encoder(tiny_model: TinyModel) -> None:
    manifest = open_bundle(tiny_model.bundle).manifest
    components = {n: c for n, c in manifest.components.items() if n != "vae_encoder"}
    with pytest.raises(BundleError, match="no vae_encoder"):
        plan(request_for(tiny_model, masked=False), replace(manifest, components=components))
