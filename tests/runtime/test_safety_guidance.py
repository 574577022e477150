"""Safety guidance, against diffusers' own pipeline of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig

from pictures import recipe_in
from safe import safe_expected, safe_pipeline
from sd_engines.errors import ConfigError
from sd_runtime import Request
from sd_runtime.cli import main
from sd_runtime.engines import first_batches
from sd_runtime.plan import plan
from sd_runtime.safety_options import SAFETY_CONCEPT, SAFETY_STRENGTHS

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import TinyModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # schedulers, of numpy
    pytest.mark.filterwarnings("ignore:The decode_latents method:FutureWarning"),
]
REQUEST = Request(
    ("a cat", "a red dog", ""),
    negative_prompt="blue",
    seed=7,
    num_inference_steps=30,
    guidance_scale=30,  # so that even the weakest shows
    safety_guidance="medium",
)
SHORT = Request("a cat", seed=7, num_inference_steps=3, safety_guidance="max")
PICTURE = np.zeros((64, 64, 3), np.uint8)


def assert_same(model: TinyModel, request: Request, scheduler: Any = None) -> None:
    """Pixels within 1/255 for ≥ 99.9 %, final latents within 1e-4 (relative L2).

    What safety guidance does to the latents, which is less, is the same within a hundredth.
    """
    oracle = safe_pipeline(model.oracle.components, scheduler=scheduler)
    pixels, latents = safe_expected(oracle, request)
    result = model.pipeline.generate(request)
    assert np.linalg.norm(result.latents - latents) <= 1e-4 * np.linalg.norm(latents)
    assert (np.abs(result.pixels.astype(int) - pixels.astype(int)) <= 1).mean() >= 0.999
    off = model.pipeline.generate(replace(request, safety_guidance=None, safety_concept=None))
    done = np.linalg.norm(latents - off.latents)
    assert np.linalg.norm(result.latents - latents) <= 1e-2 * done
    assert done >= 5e-4 * np.linalg.norm(latents)


@pytest.mark.parametrize("strength", SAFETY_STRENGTHS)
def test_same_picture_as_diffusers(tiny_model: TinyModel, strength: str) -> None:
    assert asdict(SAFETY_STRENGTHS[strength]) == getattr(SafetyConfig, strength.upper())
    assert_same(tiny_model, replace(REQUEST, safety_guidance=strength))


def test_same_picture_of_another_concept_and_scheduler(tiny_model: TinyModel) -> None:
    config = tiny_model.oracle.scheduler.config
    heun = diffusers.HeunDiscreteScheduler.from_config(config)  # whose rows warm up, not its steps
    request = replace(REQUEST, num_inference_steps=8, scheduler="heun", safety_concept="a triangle")
    assert_same(tiny_model, replace(request, safety_guidance="strong"), heun)


def test_the_concept_is_that_of_diffusers(tiny_model: TinyModel) -> None:
    assert safe_pipeline(tiny_model.oracle.components).safety_concept == SAFETY_CONCEPT


@pytest.mark.parametrize("name", ["tiny_model", "xl_model"])
def test_nothing_leads_away_from_the_prompt_or_where_it_leads_away_anyway(
    name: str, request: pytest.FixtureRequest
) -> None:
    model: TinyModel = request.getfixturevalue(name)
    plain = Request("a cat", negative_prompt="red!", seed=3, num_inference_steps=3)
    off = model.pipeline.generate(plain)
    for concept, same in (("a cat", True), ("red!", True), ("a dog", False)):
        safe = replace(plain, safety_guidance="max", safety_concept=concept)
        difference = model.pipeline.generate(safe).latents - off.latents
        assert (np.linalg.norm(difference) <= 1e-4 * np.linalg.norm(off.latents)) == same


def test_it_runs_within_the_batch_that_every_bundle_has(tiny_model: TinyModel) -> None:
    manifest = tiny_model.pipeline.bundle.manifest
    planned = plan(SHORT, manifest)
    assert first_batches(planned, manifest)["unet"] == {(2, 1), (1, 1)}
    assert first_batches(plan(REQUEST, manifest), manifest)["unet"] == {(4, 2), (2, 2)}
    off = plan(replace(SHORT, safety_guidance=None), manifest)
    assert first_batches(off, manifest)["unet"] == {(2, 1)}
    assert off.texts(SHORT.images()[0]) == planned.texts(SHORT.images()[0])[:2]


def test_a_picture_without_guidance_after_one_with_is_as_before(tiny_model: TinyModel) -> None:
    plain = Request("a cat", seed=7, num_inference_steps=2, guidance_scale=1)
    before = tiny_model.pipeline.generate(plain)
    tiny_model.pipeline.generate(SHORT)
    after = tiny_model.pipeline.generate(plain)
    np.testing.assert_array_equal(after.latents, before.latents)


def test_the_command_line_and_the_recipe_know_it(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, again = tmp_path / "cat.png", tmp_path / "again.png"
    arguments = [str(tiny_model.bundle), "--threads", "1"]
    asked = ["a cat", "--seed", "7", "--num-inference-steps", "3", "--safety-guidance", "max"]
    assert main([*arguments, *asked, "--output", str(path)]) == 0
    recipe = recipe_in(path)
    assert (recipe.safety_guidance, recipe.safety_concept) == ("max", SAFETY_CONCEPT)
    assert "Safety guidance: max" in recipe.parameters()
    (expected,) = tiny_model.pipeline.generate(SHORT).recipes
    assert recipe.digest == expected.digest
    assert main([*arguments, "--from-image", str(path), "--output", str(again)]) == 0
    assert path.read_bytes() == again.read_bytes()
    wrong = [*arguments, "a cat", "--safety-guidance", "mediun", "--output", str(path)]
    assert main(wrong) == ConfigError.exit_code
    assert "Did you mean 'medium'?" in capsys.readouterr().err


def test_recipes_of_before_have_none(tiny_model: TinyModel) -> None:
    (recipe,) = tiny_model.pipeline.generate(replace(SHORT, safety_guidance=None)).recipes
    values = json.loads(json.dumps(asdict(recipe)))
    del values["safety_guidance"], values["safety_concept"]
    assert type(recipe).from_json(values) == recipe


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"safety_guidance": "mild"}, "safety_guidance is 'mild'"),
        ({"safety_guidance": ["max"]}, "safety_guidance is "),
        ({"safety_concept": "a cat"}, "without safety_guidance"),
        ({"safety_guidance": "max", "safety_concept": " "}, "safety_concept is ' '"),
        ({"safety_guidance": "max", "safety_concept": ["a"]}, "safety_concept is "),
        ({"safety_guidance": "max", "safety_concept": "\ud800"}, "no Unicode text"),
        (
            {"safety_guidance": "max", "safety_concept": "(a:1.2.3)", "prompt_weighting": True},
            "weight",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Request.from_mapping({"prompt": "a cat", **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_scale": 1.0}, "without guidance"),
        ({"guidance_start": 0.5}, "guidance_start"),
        ({"guidance_stop": 0.5}, "guidance_stop"),
        ({"image": PICTURE}, "image"),
        ({"image": PICTURE, "mask": PICTURE}, "image"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(
    tiny_model: TinyModel, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=f"safety_guidance .*{words}"):
        tiny_model.pipeline.stream(replace(SHORT, **options))


def test_models_that_cannot_be_led_away_are_refused_by_name(
    consistency_model: TinyModel,
    controlled_model: TinyModel,
    xl_model: TinyModel,
    refiner_model: TinyModel,
) -> None:
    with pytest.raises(ConfigError, match="safety_guidance without guidance"):
        consistency_model.pipeline.stream(SHORT)
    controlled = replace(SHORT, control_image=[PICTURE, PICTURE])
    with pytest.raises(ConfigError, match="safety_guidance and control_image"):
        controlled_model.pipeline.stream(controlled)
    with pytest.raises(ConfigError, match="a refiner's are another model's"):
        plan(
            SHORT,
            xl_model.pipeline.bundle.manifest,
            refiner=refiner_model.pipeline.bundle.manifest,
        )


def test_control_pictures_of_before_are_forgotten(controlled_model: TinyModel) -> None:
    pipeline = controlled_model.pipeline
    expected = pipeline.generate(SHORT).latents
    picture = np.full((24, 24, 3), 200, np.uint8)
    pipeline.generate(
        Request(
            "a cat",
            seed=1,
            num_inference_steps=1,
            guidance_scale=1,
            control_image=[picture, picture],
        )
    )
    np.testing.assert_array_equal(pipeline.generate(SHORT).latents, expected)
