"""LDM3D's upscaler: the picture and the depth map of diffusers' community pipeline (`ldm3d`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from ldm3d import DEPTH, PICTURE, UPSCALED, upscaled_expected
from sd_engines.errors import ConfigError
from sd_engines.spec import Defaults
from sd_runtime import Request
from sd_runtime.cli import main
from sd_runtime.depth_map import DepthMap
from sd_runtime.plan import plan
from sd_runtime.task import check_served, plainest_request, tasks_of

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines.manifest import Manifest
    from sd_runtime import Pipeline

# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.fixture
def pipeline(ldm3d_upscaler: Pipeline) -> Pipeline:
    return ldm3d_upscaler


@pytest.fixture
def manifest(pipeline: Pipeline) -> Manifest:
    return pipeline.bundle.manifest


@pytest.mark.parametrize("case", range(len(UPSCALED)))
def test_picture_and_depth_are_those_of_diffusers(pipeline: Pipeline, case: int) -> None:
    request = Request("a red circle", seed=7, image=PICTURE, depth_map=DEPTH, **UPSCALED[case])
    _assert_same(pipeline, request, case)


def test_each_picture_of_a_batch_has_its_own_draws(pipeline: Pipeline) -> None:
    prompts = ("a red circle",) * 3
    request = Request(prompts, seed=(7, 8, 7), image=PICTURE, depth_map=DEPTH, **UPSCALED[0])
    first, second, third = _assert_same(pipeline, request, 0)
    np.testing.assert_array_equal(first, third)
    assert (first != second).any()


def _assert_same(pipeline: Pipeline, request: Request, case: int) -> np.ndarray:
    """That the first and last pictures are those of a case; returns all of them."""
    result, expected = pipeline.generate(request), upscaled_expected()
    latents, depth = expected[f"latents_{case}"], expected[f"depth_{case}"]
    assert result.depth is not None
    assert (result.depth.dtype, result.depth.shape[1:]) == (np.uint16, (16, 24))
    for index in (0, -1):
        difference = np.linalg.norm(result.latents[index] - latents[0])
        assert difference <= 1e-4 * np.linalg.norm(latents)
        within = np.abs(result.pixels[index].astype(int) - expected[f"pixels_{case}"][0]) <= 1
        assert within.mean() >= 0.999
        within = np.abs(result.depth[index].astype(int) - depth[0]) <= 1
        assert within.mean() >= 0.99
    return result.pixels


def test_it_is_data_of_the_bundle(manifest: Manifest) -> None:
    model = manifest.model
    assert (model.family, model.max_noise_level) == ("ldm3d-upscaler", 350)
    assert model.defaults == Defaults(num_inference_steps=75, guidance_scale=9.0)
    inputs = {spec.name: spec.shape for spec in manifest.components["unet"].inputs[3:]}
    assert inputs == {"image_latents": ("pictures", 4, 8, 12), "noise_level": ("pictures",)}
    encoder, decoder = manifest.components["vae_encoder"], manifest.components["vae_decoder"]
    assert encoder.inputs == decoder.outputs
    (proof,) = (entry for entry in manifest.certificate if entry.component == "end_to_end")
    assert (proof.metric, proof.figure >= 0.999) == ("pixels_within_1", True)
    assert "StableDiffusionUpscalePipeline on VaeImageProcessorLDM3D" in proof.reference
    assert tasks_of(manifest) == ("upscaling",)
    assert plan(plainest_request(manifest), manifest).request.noise_level == 20
    with pytest.raises(ConfigError, match="is an upscaler"):
        check_served(manifest)


def test_depth_of_eight_bits_is_that_of_sixteen(pipeline: Pipeline) -> None:
    eight = (DEPTH >> 8).astype(np.uint8)
    grey = Image.fromarray(eight)
    found = DepthMap.of(grey.convert("RGB"), name="depth").scaled(16, 24)
    wide = DepthMap.of(eight * np.uint16(257), name="depth").scaled(16, 24)
    np.testing.assert_array_equal(found, wide)
    narrow = DepthMap.of(eight.astype(np.uint16), name="depth")  # of the same values
    assert narrow.scaled(16, 24).max() < 1 / 256
    request = Request("a cat", seed=1, image=PICTURE, num_inference_steps=2)
    drawn = [
        pipeline.generate(replace(request, depth_map=depth_map)).pixels
        for depth_map in (grey, narrow, eight * np.uint16(257))
    ]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert (drawn[0] != drawn[1]).any()


def test_sd_run_writes_both(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PICTURE).save("small.png")
    Image.fromarray(DEPTH).save("small.depth.png")
    given = ["--image", "small.png", "--depth-map", "small.depth.png", "--threads", "1", "--quiet"]
    options = ["--noise-level", "30", "--num-inference-steps", "2", "--seed", "5"]
    run = [str(pipeline.bundle.path), *given]
    assert main([*run, "a cat", *options, "--output", "large.png"]) == 0
    expected = pipeline.generate(
        Request(
            "a cat", seed=5, image=PICTURE, depth_map=DEPTH, noise_level=30, num_inference_steps=2
        )
    )
    assert expected.depth is not None
    np.testing.assert_array_equal(np.asarray(Image.open("large.png")), expected.pixels[0])
    with Image.open("large.depth.png") as depth:
        assert depth.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(depth), expected.depth[0])
    assert main([*run, "--from-image", "large.png", "--output", "again.png"]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open("again.png")), expected.pixels[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth_map": None}, "LDM3D's upscaler: it makes a picture and its depth larger"),
        ({"depth_map": None, "image": None}, "it makes a picture larger"),
        ({"depth_map": DEPTH / 65535}, "no known range"),
        ({"strength": 0.5}, "strength is not for an upscaler"),
        ({"mask": PICTURE[..., 0]}, "mask is not for an upscaler"),
        ({"noise_level": 351}, "knows 350 at most"),
        ({"height": 32}, "draws 16×24"),
    ],
)
def test_what_it_does_not_do_is_refused(
    manifest: Manifest, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(Request("a cat", **{"image": PICTURE, "depth_map": DEPTH, **options}), manifest)
