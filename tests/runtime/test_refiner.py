"""A base model and its refiner on one picture, against diffusers' two pipelines."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import diffusers
import numpy as np
import pytest
import torch

from sd_engines.errors import ConfigError
from sd_runtime import Pipeline, Request
from sd_runtime.cli import main
from sd_runtime.plan import plan

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import TinyModel

# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

CLASSES = {
    "unipc": diffusers.UniPCMultistepScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++_2m": diffusers.DPMSolverMultistepScheduler,
}


@pytest.fixture(scope="module")
def refined(xl_model: TinyModel, refiner_model: TinyModel) -> Iterator[Pipeline]:
    """The two bundles, one after the other."""
    with Pipeline.load(xl_model.bundle, threads=1, refiner=refiner_model.bundle) as pipeline:
        yield pipeline


@pytest.mark.parametrize(
    ("scheduler", "steps", "share"),
    [(None, 5, None), (None, 4, 0.3), ("unipc", 4, 0.6), ("euler_a", 5, 0.5), ("dpm++_2m", 6, 0.5)],
)
def test_refiner_goes_on_where_the_base_stops(
    xl_model: TinyModel,
    refiner_model: TinyModel,
    refined: Pipeline,
    scheduler: str | None,
    steps: int,
    share: float | None,
) -> None:
    request = Request(
        ("a red circle!", "a cat"),
        seed=7,
        num_inference_steps=steps,
        scheduler=scheduler,
        high_noise_frac=share,
    )
    base, second = xl_model.oracle, refiner_model.oracle
    own = base.scheduler, second.scheduler
    if scheduler is not None:
        base.scheduler = CLASSES[scheduler].from_config(own[0].config)
        second.scheduler = CLASSES[scheduler].from_config(own[1].config)
    share = 0.8 if share is None else share
    try:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in (7, 8)]
        options = {"num_inference_steps": steps, "generator": generators, "guidance_scale": 5.0}
        prompts = list(request.prompts)
        latents = base(prompts, denoising_end=share, output_type="latent", **options).images
        pictures = second(prompts, image=latents, denoising_start=share, **options).images
    finally:
        base.scheduler, second.scheduler = own
    result = refined.generate(request)
    pixels = np.stack([np.asarray(picture) for picture in pictures]).astype(int)
    assert (np.abs(result.pixels.astype(int) - pixels) <= 1).mean() >= 0.999
    assert result.recipes[0].high_noise_frac == share


def test_both_draw_their_share_of_the_rows(refined: Pipeline, refiner_model: TinyModel) -> None:
    request = Request("a cat", seed=0, num_inference_steps=5)
    steps = list(refined.stream(request))
    assert [step.index for step in steps] == list(range(5))
    assert {step.num_steps for step in steps} == {5}
    assert [step.timestep for step in steps] == sorted((s.timestep for s in steps), reverse=True)
    manifests = refined.bundle.manifest, refiner_model.pipeline.bundle.manifest
    planned = plan(request, manifests[0], refiner=manifests[1])
    assert planned.table.num_rows == 4
    assert planned.refining is not None
    assert planned.refining.table.num_rows == 1
    assert planned.num_rows == 5


def test_a_refined_picture_is_drawn_again(
    xl_model: TinyModel, refiner_model: TinyModel, tmp_path: Path
) -> None:
    bundle, refiner = str(xl_model.bundle), ["--refiner", str(refiner_model.bundle)]
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    quick = ["--num-inference-steps", "3", "--high-noise-frac", "0.6", "--backend", "onnxruntime"]
    assert main([bundle, "a cat", "-o", str(first), "--seed", "1", *quick, *refiner]) == 0
    assert main([bundle, "--from-image", str(first), "-o", str(second)]) == 2
    assert not second.exists()
    assert main([bundle, "--from-image", str(first), "-o", str(second), *refiner]) == 0
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheduler": "heun"}, "two models cannot share a step"),
        ({"guidance_stop": 0.5}, "guidance holds for every step"),
        ({"image": np.zeros((16, 16, 3), np.uint8)}, "begin as noise"),
        ({"high_noise_frac": 0.9999, "num_inference_steps": 2}, "none is left after 0.9999"),
        ({"high_noise_frac": 0.001, "num_inference_steps": 2}, "none is before 0.001"),
    ],
)
def test_what_two_models_cannot_share_is_refused(
    refined: Pipeline, options: dict[str, object], words: str
) -> None:
    request = replace(Request("a cat", seed=0), **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=words):
        refined.stream(request)


def test_wrong_pairs_are_refused(xl_model: TinyModel, refiner_model: TinyModel) -> None:
    base, refiner = (model.pipeline.bundle.manifest for model in (xl_model, refiner_model))
    request = Request("a cat", num_images_per_prompt=2)
    with pytest.raises(ConfigError, match="is no refiner") as caught:
        plan(request, base, refiner=base)
    assert "stable-diffusion-xl-refiner-1.0" in caught.value.hint
    tall = replace(refiner, profile=replace(refiner.profile, height=32))
    with pytest.raises(ConfigError, match="draws 16×16") as caught:
        plan(request, base, refiner=tall)
    assert "--height 16 --width 16" in caught.value.hint
    single = replace(refiner, profile=replace(refiner.profile, batch_size=1))
    with pytest.raises(ConfigError, match="its refiner 1") as caught:
        plan(request, base, refiner=single)
    assert "--batch-size 2" in caught.value.hint
    with pytest.raises(ConfigError, match=r"high_noise_frac is 0\.7 without a refiner"):
        plan(replace(request, high_noise_frac=0.7), base)


@pytest.mark.parametrize("share", [0, 1, -0.1, "0.8"])
def test_shares_that_are_none_are_refused(share: object) -> None:
    with pytest.raises(ConfigError, match="high_noise_frac"):
        Request("a cat", high_noise_frac=share)  # type: ignore[arg-type]


def test_a_refiner_of_several_sizes_takes_that_of_its_base(
    xl_model: TinyModel, refiner_model: TinyModel, tmp_path: Path
) -> None:
    from sd_export import export

    both = {"height": 32, "width": 32, "sizes": [(16, 16)], "batch_size": 2}
    export(refiner_model.checkpoint, tmp_path / "bundle", backends=("onnxruntime",), **both)
    request = Request("a cat", seed=1, num_inference_steps=4)
    drawn = []
    for first in (None, request):
        with Pipeline.load(
            xl_model.bundle, threads=1, refiner=tmp_path / "bundle", request=first
        ) as pipeline:
            assert pipeline.refiner is not None
            assert (pipeline.refiner.profile.height, pipeline.refiner.profile.width) == (16, 16)
            drawn.append(pipeline.generate(request).pixels)
    np.testing.assert_array_equal(*drawn)
