"""Recipes: written, read back, and refused when they are something else."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from sd_engines.errors import ConfigError
from sd_runtime import Recipe
from sd_runtime.input_image import InputImage
from sd_runtime.recipe import recipes_from_text, text_from_recipes

RECIPE = Recipe(
    prompt="a red circle 🦊",
    negative_prompt="blue",
    seed=2**64 - 1,
    num_inference_steps=20,
    guidance_scale=7.5,
    scheduler="ddim",
    eta=0.5,
    height=64,
    width=128,
    backend="onnxruntime",
    precision="fp32",
    model="tiny/model",
    revision=None,
    fingerprint="0123456789abcdef",
)
FROM_IMAGE = replace(RECIPE, image="ab" * 32, mask="cd" * 32, strength=0.5)


def test_round_trip() -> None:
    text = text_from_recipes([RECIPE, replace(RECIPE, seed=3)], columns=2)
    assert text.isascii()
    assert recipes_from_text(text) == ([RECIPE, replace(RECIPE, seed=3)], 2)


def test_request_of_a_recipe() -> None:
    request = RECIPE.request()
    for name in ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale"):
        assert getattr(request, name) == getattr(RECIPE, name)
    for name in ("scheduler", "eta", "height", "width"):
        assert getattr(request, name) == getattr(RECIPE, name)


def test_request_of_a_recipe_from_a_picture() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    request = replace(FROM_IMAGE, mask=None).request(image=pixels)
    assert request.strength == 0.5
    assert request.image == InputImage.of(pixels, name="image")
    with pytest.raises(ConfigError, match="its mask") as caught:
        FROM_IMAGE.request(image=pixels)
    assert caught.value.hint == "Give it again: --mask FILE."
    assert recipes_from_text(text_from_recipes([FROM_IMAGE], columns=1)) == ([FROM_IMAGE], 1)


def test_recipes_from_before_an_option_was_there() -> None:
    data = json.loads(text_from_recipes([RECIPE], columns=1))
    for name in ("guidance_start", "guidance_stop", "cache_interval"):
        del data["recipes"][0][name]
    assert recipes_from_text(json.dumps(data)) == ([RECIPE], 1)


def test_parameters_as_other_tools_read_them() -> None:
    assert RECIPE.parameters() == (
        "a red circle 🦊\nNegative prompt: blue\nSteps: 20, Sampler: ddim, CFG scale: 7.5, "
        "Seed: 18446744073709551615, Size: 128x64, Model hash: 0123456789, Model: tiny/model, "
        "Version: sd-toolkit, Eta: 0.5"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"seed": "7"},
        {"num_inference_steps": 0},
        {"num_inference_steps": None},
        {"guidance_scale": None},
        {"guidance_stop": 0.0},
        {"cache_interval": 0},
        {"prompt": 7},
        {"scheduler": None},
        {"revision": 7},
        {"backend": 7},
        {"more": 1},
        {"image": 7, "strength": 0.5},
        {"image": "ab"},
        {"strength": 0.5},
        {"mask": "ab"},
        {"depth_map": "ab"},
        {"image": "ab", "strength": "0.5"},
        {"image": "ab", "strength": 0.5, "mask": 7},
        {"image": "ab", "prompt": "", "strength": 0.5, "noise_level": 20},
        {"control_image": []},
        {"control_image": [7]},
        {"refiner": "tiny/refiner"},
        {"high_noise_frac": 0.8},
    ],
)
def test_wrong_values_are_refused(change: dict[str, object]) -> None:
    data = json.loads(text_from_recipes([RECIPE], columns=1))
    data["recipes"][0] = {**asdict(RECIPE), **change}
    with pytest.raises(ConfigError):
        recipes_from_text(json.dumps(data))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"format_version": 2}',
        '{"format_version": 1, "columns": 1, "recipes": []}',
        '{"format_version": 1, "columns": 1, "recipes": [7]}',
        '{"format_version": 1, "columns": 2, "recipes": [{}]}',
    ],
)
def test_something_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="recipe cannot be read"):
        recipes_from_text(text)
