"""ControlNets against the unmodified pipelines of diffusers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from controlnets import control_picture, control_request
from pictures import recipe_in
from sd_engines.bundle import open_bundle
from sd_engines.errors import ConfigError
from sd_runtime import Pipeline
from sd_runtime.cli import main
from sd_runtime.controlnet import controlnet_names
from sd_runtime.plan import plan
from sd_runtime.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import TinyModel

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def picture(seed: int, *, size: tuple[int, int] = (24, 24)) -> Image.Image:
    return control_picture(seed, size)


request_for = partial(control_request, (24, 24))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"controlnet_conditioning_scale": 0.6, "scheduler": "euler_a"},
        {"controlnet_conditioning_scale": (0.5, 1.3), "negative_prompt": "red"},
        {"controlnet_conditioning_scale": (0.0, -1.0)},
        {"control_guidance_end": 0.5, "scheduler": "pndm"},
        {"control_guidance_start": (0.0, 0.3), "control_guidance_end": (0.6, 1.0)},
        {"guess_mode": True, "controlnet_conditioning_scale": (0.8, 1.2)},
        {"guess_mode": True, "guidance_scale": 1.0},
        {"prompt": ("a cat", "a dog", "a horse"), "control_guidance_start": 0.4},
        {"control_image": [picture(2, size=(40, 31)), picture(3, size=(48, 48)).convert("L")]},
        {"control_image": [picture(0), picture(0)]},
    ],
    ids=str,
)
def test_same_picture_as_diffusers(controlled_model: TinyModel, options: dict[str, Any]) -> None:
    controlled_model.assert_same(request_for(**options))


@pytest.mark.parametrize("options", [{"strength": 0.6}, {}, {"masked": True}], ids=str)
def test_from_a_picture_too(controlled_model: TinyModel, options: dict[str, Any]) -> None:
    mask = picture(5).convert("L") if options.pop("masked", False) else None
    controlled_model.assert_same(request_for(image=picture(4), mask=mask, **options))


def test_one_of_two_is_the_same_as_one_alone(controlled_model: TinyModel) -> None:
    request = request_for(controlnet_conditioning_scale=(0.0, 1.0))
    oracle = diffusers.StableDiffusionControlNetPipeline(
        **controlled_model.oracle.components,
        controlnet=controlled_model.controlnets[1],
        requires_safety_checker=False,
    )
    oracle.set_progress_bar_config(disable=True)
    (wanted,) = oracle(
        "a cat",
        image=request.control_image[1].image,
        generator=torch.Generator("cpu").manual_seed(8),
        num_inference_steps=4,
        guidance_scale=3.0,
    ).images
    with Pipeline.load(controlled_model.bundle, threads=1, request=request) as pipeline:
        result = pipeline.generate(request)
        assert "controlnet_0" not in pipeline.engines
        assert "controlnet_1" in pipeline.engines
    assert (np.abs(result.pixels[0].astype(int) - np.asarray(wanted)) <= 1).mean() >= 0.999


def test_the_bundle_holds_and_proves_them(controlled_model: TinyModel) -> None:
    manifest = open_bundle(controlled_model.bundle).manifest
    unet, net = (manifest.components[name] for name in ("unet", "controlnet_1"))
    assert unet.inputs[3:] == net.outputs
    assert [spec.name for spec in net.outputs] == [
        "down_block_additional_residual_0",
        "down_block_additional_residual_1",
        "mid_block_additional_residual",
    ]
    (embeds,) = manifest.components["control_embedding_1"].outputs
    assert net.inputs[3] == replace(embeds, shape=("pictures", *embeds.shape[1:]))
    assert manifest.profile.max_batch("controlnet_1", net.inputs) == 4
    proven = {entry.component: entry.figure for entry in manifest.certificate}
    assert proven.keys() == {*manifest.components, "end_to_end"}
    assert proven["end_to_end"] >= 0.999


def test_without_a_control_picture_it_draws_as_the_checkpoint(controlled_model: TinyModel) -> None:
    plain = replace(request_for(), control_image=None)
    led = controlled_model.pipeline.generate(request_for())  # leaves residuals in the buffers
    controlled_model.assert_same(plain)
    result = controlled_model.pipeline.generate(plain)
    assert "controlnet" not in result.timings.spans
    assert (led.pixels != result.pixels).mean() > 0.1


def test_it_runs_only_where_it_counts_and_looks_at_a_picture_once(
    controlled_model: TinyModel,
) -> None:
    controlled_model.pipeline.forget_prompts()
    request = request_for(
        prompt=("a", "b", "c"), num_inference_steps=10, control_guidance_end=(0.3, 0.0001)
    )
    timings = controlled_model.pipeline.generate(request).timings
    assert len(timings.runs_ms("controlnet")) == 2 * 3  # two batches
    assert len(timings.runs_ms("unet")) == 2 * 10
    assert len(timings.runs_ms("control_embedding")) == 1
    again = controlled_model.pipeline.generate(request).timings
    assert again.runs_ms("control_embedding") == []


def test_a_recipe_needs_the_control_pictures_again(
    controlled_model: TinyModel, tmp_path: Path
) -> None:
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for seed, path in enumerate(paths):
        picture(seed).save(path)
    bundle, first = str(controlled_model.bundle), str(tmp_path / "first.png")
    pictures = [f"--control-image={path}" for path in paths]
    scales = ["--controlnet-conditioning-scale=0.7", "--controlnet-conditioning-scale=1.5"]
    asked = [*pictures, *scales, "--control-guidance-end=0.8", "--seed=1"]
    asked += ["--num-inference-steps=3", "--quiet"]
    assert main([bundle, "a cat", "--output", first, *asked]) == 0
    recipe = recipe_in(tmp_path / "first.png")
    assert recipe.controlnet_conditioning_scale == (0.7, 1.5)
    assert 'ControlNet 1: "Weight: 1.5, Guidance Start: 0, Guidance End: 0.8"' in (
        recipe.parameters()
    )
    assert Recipe.from_json(json.loads(json.dumps(asdict(recipe)))) == recipe
    for broken in (
        {"control_image": []},
        {"control_image": "one"},
        {"control_image": [1, 2]},
        {"controlnet_conditioning_scale": []},
        {"controlnet_conditioning_scale": [1, 2, 3]},
        {"control_guidance_end": "1"},
        {"guess_mode": 1},
    ):
        with pytest.raises(ConfigError):
            Recipe.from_json(json.loads(json.dumps(asdict(recipe))) | broken)
    again = str(tmp_path / "again.png")
    assert main([bundle, "--from-image", first, "--output", again, "--quiet"]) == 2
    with pytest.raises(ConfigError, match="its control_image, which its recipe does not") as caught:
        recipe.request()
    assert caught.value.hint.count("--control-image FILE") == 2
    assert main([bundle, "--from-image", first, "--output", again, "--quiet", *pictures]) == 0
    one, two = (np.asarray(Image.open(path)) for path in (first, again))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control_image": picture(0)}, "1 control pictures for the 2 ControlNets"),
        ({"control_image": []}, "an empty list"),
        ({"control_image": ["no-such.png", picture(0)]}, "cannot read the picture no-such.png"),
        ({"control_image": None, "guess_mode": True}, "guess_mode without a control picture"),
        (
            {"control_image": None, "control_guidance_end": 0.5},
            "control_guidance_end without a control picture",
        ),
        ({"controlnet_conditioning_scale": float("nan")}, "controlnet_conditioning_scale is nan"),
        ({"controlnet_conditioning_scale": (1.0, "2")}, "controlnet_conditioning_scale is '2'"),
        ({"controlnet_conditioning_scale": (1.0, 1.0, 1.0)}, "3 numbers for 2 control pictures"),
        ({"control_guidance_start": 1.5}, "control_guidance_start is 1.5"),
        ({"control_guidance_start": (0.2, 0.9), "control_guidance_end": 0.9}, "starts at 0.9 and"),
        ({"cache_interval": 2}, "has no shallow UNet"),
    ],
)
def test_what_cannot_be_asked(
    controlled_model: TinyModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        controlled_model.pipeline.stream(request_for(**options))


def test_a_bundle_without_controlnets_names_the_right_one(controlled_model: TinyModel) -> None:
    manifest = open_bundle(controlled_model.bundle).manifest
    components = {n: c for n, c in manifest.components.items() if not n.startswith("control")}
    with pytest.raises(ConfigError, match="has no ControlNet") as caught:
        plan(request_for(), replace(manifest, components=components))
    assert "--controlnet CONTROLNET" in caught.value.hint


def test_a_bundle_says_what_its_controlnets_are(controlled_model: TinyModel) -> None:
    manifest = open_bundle(controlled_model.bundle).manifest
    folder = controlled_model.bundle.parent
    assert manifest.model.controlnets == (f"{folder}/controlnet0", f"{folder}/controlnet1")
    for sources, names in (
        (manifest.model.controlnets, ("controlnet0", "controlnet1")),
        (
            ("lllyasviel/sd-controlnet-canny@" + "a" * 40, "./depth@2"),
            ("sd-controlnet-canny", "depth@2"),
        ),
        (("a/canny", "b/canny"), ("controlnet_0", "controlnet_1")),
        (("a/canny", "/"), ("canny", "controlnet_1")),
        ((), ("controlnet_0", "controlnet_1")),
    ):
        model = replace(manifest.model, controlnets=sources)
        assert controlnet_names(replace(manifest, model=model)) == names
