"""Latent consistency models, SD-Turbo and Stable Diffusion 2, against diffusers' own pipelines."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import diffusers
import numpy as np
import pytest

from sd_engines.bundle import open_bundle
from sd_engines.errors import ConfigError
from sd_engines.seal import seal
from sd_engines.spec import TIMESTEP_COND, Defaults
from sd_runtime import Pipeline, Request
from sd_runtime.engines import first_batches
from sd_runtime.plan import plan

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import TinyModel


# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.mark.parametrize(
    "request_",
    [
        Request("a red circle", seed=7),  # with diffusers' own steps and guidance
        Request("a red circle", seed=7, guidance_scale=1, num_inference_steps=1),
        Request(("a cat", "a dog", ""), seed=3, guidance_scale=3, num_inference_steps=8),
    ],
    ids=["defaults", "one step", "a second batch"],
)
def test_consistency_model_draws_as_its_own_pipeline(
    consistency_model: TinyModel, request_: Request
) -> None:
    consistency_model.assert_same(request_)


def test_consistency_model_is_one_call_a_step(consistency_model: TinyModel) -> None:
    assert type(consistency_model.oracle) is diffusers.LatentConsistencyModelPipeline
    manifest = consistency_model.pipeline.bundle.manifest
    assert manifest.model.family == "stable-diffusion-v1"
    assert manifest.model.defaults == Defaults(num_inference_steps=4, guidance_scale=8.5)
    unet = manifest.components["unet"]
    assert unet.inputs[-1].name == TIMESTEP_COND
    assert unet.inputs[-1].shape == ("batch", 256)
    assert manifest.profile.max_batch("unet", unet.inputs) == 2  # not twice, as guidance would
    planned = plan(Request(""), manifest)
    assert len(planned.guided_rows) == 0
    assert first_batches(planned, manifest)["unet"] == {(1, 1)}
    result = consistency_model.pipeline.generate(Request("a cat", seed=0))
    assert len(result.timings.runs_ms("unet")) == 4
    (recipe,) = result.recipes
    assert (recipe.num_inference_steps, recipe.guidance_scale) == (4, 8.5)
    again = consistency_model.pipeline.generate(recipe.request())
    assert np.array_equal(again.pixels, result.pixels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"negative_prompt": "red"}, "no negative prompt"),
        ({"negative_prompt": ("red",), "prompt": ("a cat",)}, "no negative prompt"),
        ({"guidance_start": 0.5}, "every step"),
        ({"guidance_stop": 0.5}, "every step"),
        ({"num_inference_steps": 51}, "51 steps"),
    ],
)
def test_consistency_model_refuses_what_it_was_not_distilled_for(
    consistency_model: TinyModel, options: dict[str, object], words: str
) -> None:
    request = replace(Request("a cat", seed=0), **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=words):
        consistency_model.pipeline.stream(request)


@pytest.fixture
def turbo_model(v2_model: TinyModel, tmp_path: Path) -> Iterator[TinyModel]:
    """``v2_model`` scheduled as stabilityai/sd-turbo, which has the same graphs."""
    scheduler = diffusers.EulerDiscreteScheduler.from_config(
        v2_model.oracle.scheduler.config, prediction_type="epsilon", timestep_spacing="trailing"
    )
    oracle = diffusers.StableDiffusionPipeline(
        **{**v2_model.oracle.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    oracle.set_progress_bar_config(disable=True)
    staging = shutil.copytree(v2_model.bundle, tmp_path / "staging")
    (staging / "bundle.json").unlink()
    manifest = v2_model.pipeline.bundle.manifest
    spec = replace(
        manifest.model,
        scheduler={**scheduler.config, "_class_name": "EulerDiscreteScheduler"},
        prediction_type="epsilon",
        defaults=Defaults(num_inference_steps=1, guidance_scale=0.0),
    )
    seal(staging, tmp_path / "bundle", replace(manifest, model=spec))
    with Pipeline.load(tmp_path / "bundle", threads=1) as pipeline:
        yield replace(v2_model, bundle=tmp_path / "bundle", pipeline=pipeline, oracle=oracle)


def test_turbo_draws_in_one_step_without_guidance(turbo_model: TinyModel) -> None:
    silent = turbo_model.pipeline.generate(Request("a red circle!", seed=7))
    assert len(silent.timings.runs_ms("unet")) == 1
    told = Request("a red circle!", seed=7, num_inference_steps=1, guidance_scale=0)
    turbo_model.assert_same(told)
    assert np.array_equal(turbo_model.pipeline.generate(told).pixels, silent.pixels)


@pytest.mark.parametrize("steps", [2, 4])
def test_turbo_draws_in_few_steps(turbo_model: TinyModel, steps: int) -> None:
    request = Request("a cat", seed=1, num_inference_steps=steps, guidance_scale=0)
    turbo_model.assert_same(request)


@pytest.mark.parametrize("scheduler", [None, "euler", "dpm++_2m_karras"])
def test_v2_draws_as_diffusers(v2_model: TinyModel, scheduler: str | None) -> None:
    manifest = v2_model.pipeline.bundle.manifest
    assert manifest.model.family == "stable-diffusion-v2"
    assert manifest.model.prediction_type == "v_prediction"
    assert manifest.model.defaults == Defaults(num_inference_steps=50, guidance_scale=7.5)
    request = Request(
        "a cat! !", negative_prompt="red!", seed=2, scheduler=scheduler, num_inference_steps=4
    )
    v2_model.assert_same(request)


@pytest.mark.parametrize("name", ["consistency_model", "v2_model"])
def test_tensorrt_rtx_plans_build(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from sd_export import build

    model: TinyModel = request.getfixturevalue(name)
    bundle = shutil.copytree(model.bundle, tmp_path / "bundle")
    build(bundle, backends=("tensorrt-rtx",))
    engines = {e.component: e for e in open_bundle(bundle).manifest.engines if "rtx" in e.backend}
    assert engines["unet"].bytes > 0
    assert engines["unet"].precision == "fp16"
