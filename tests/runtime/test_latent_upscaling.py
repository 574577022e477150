"""The x2 latent upscaler: the picture of diffusers' own pipeline, from the same small one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime import InferenceSession

from sd_engines.errors import ConfigError
from sd_engines.spec import Defaults
from sd_export import build
from sd_export.onnx_export import save
from sd_export.onnx_passes import to_half
from sd_export.verify import probe_inputs, relative_l2
from sd_runtime import Pipeline, Request
from sd_runtime.plan import plan
from sd_runtime.task import check_served, tasks_of

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import TinyUpscaler

# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

ROWS, COLUMNS = np.mgrid[:8, :8]
PICTURE = np.stack([ROWS * 30, COLUMNS * 30, 255 - ROWS * 9], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    "request_",
    [
        Request("a red circle", seed=7, image=PICTURE),
        Request("a red circle", seed=7, image=PICTURE, num_inference_steps=4, guidance_scale=0),
        Request("a red circle", seed=7, image=PICTURE, num_inference_steps=4, guidance_scale=1),
        Request(
            ("a cat", "", "a dog"),
            negative_prompt="red!",
            seed=3,
            image=PICTURE,
            num_inference_steps=3,
            guidance_scale=3,
        ),
        Request("a cat", seed=1, image=PICTURE, num_inference_steps=4, scheduler="euler_karras"),
    ],
    ids=["defaults", "no prompt", "unguided", "a second batch", "karras"],
)
def test_latent_upscaler_draws_as_diffusers(
    latent_upscaler_model: TinyUpscaler, request_: Request
) -> None:
    latent_upscaler_model.assert_same(request_)


def test_latent_upscaler_is_data_of_the_bundle(latent_upscaler_model: TinyUpscaler) -> None:
    manifest = latent_upscaler_model.pipeline.bundle.manifest
    assert manifest.model.family == "stable-diffusion-x2-latent-upscaler"
    assert manifest.model.defaults == Defaults(num_inference_steps=75, guidance_scale=9.0)
    assert (manifest.model.prediction_type, manifest.model.max_noise_level) == ("sample", 0)
    names = [spec.name for spec in manifest.components["unet"].inputs[3:]]
    assert names == ["low_res_latents", "pooled_prompt_embeds"]
    assert manifest.components["vae_encoder"].inputs[0].shape == ("batch", 8, 8, 3)
    (proof,) = (entry for entry in manifest.certificate if entry.component == "end_to_end")
    assert (proof.metric, proof.figure >= 0.999) == ("pixels_within_1", True)
    assert tasks_of(manifest) == ("upscaling",)
    with pytest.raises(ConfigError, match="is an upscaler"):
        check_served(manifest)


def test_openvino_runs_its_norms(latent_upscaler_model: TinyUpscaler, tmp_path: Path) -> None:
    bundle = shutil.copytree(latent_upscaler_model.bundle, tmp_path / "bundle")
    manifest = build(bundle, backends=("openvino",))
    proven = {entry.component for entry in manifest.certificate if entry.backend == "openvino"}
    assert proven == set(manifest.components)


@pytest.mark.parametrize("name", ["upscaler_model", "latent_upscaler_model"])
def test_half_precision_is_a_valid_graph(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: TinyUpscaler = request.getfixturevalue(name)
    save(to_half(ir.load(model.bundle / "unet/model.onnx"), "fp16"), tmp_path / "unet")
    entry = model.pipeline.bundle.manifest.components["unet"]
    profile = model.pipeline.profile
    inputs = probe_inputs("unet", entry.inputs, profile=profile, vocab_size=0)
    expected, found = (
        InferenceSession(folder / "model.onnx").run(None, inputs)[0]
        for folder in (model.bundle / "unet", tmp_path / "unet")
    )
    assert relative_l2(found, expected) < 3e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": None}, "it makes a picture larger"),
        ({"strength": 0.5}, "strength is not for an upscaler"),
        ({"noise_level": 20}, "knows 0 at most"),
        ({"height": 32}, "comes out 16×16, not 32×16"),
    ],
)
def test_what_a_latent_upscaler_does_not_do_is_refused(
    latent_upscaler_model: TinyUpscaler, options: dict[str, Any], words: str
) -> None:
    request = Request("a cat", image=PICTURE)
    with pytest.raises(ConfigError, match=words):
        plan(replace(request, **options), latent_upscaler_model.pipeline.bundle.manifest)


def test_what_the_first_picture_needs_is_open_before_it(
    latent_upscaler_model: TinyUpscaler,
) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    request = Request("a cat", seed=1, num_inference_steps=2, image=image)
    with Pipeline.load(latent_upscaler_model.bundle, threads=1, request=request) as pipeline:
        opened = set(pipeline.engines)
        pipeline.generate(request)
        assert set(pipeline.engines) == opened
        assert "vae_encoder" in opened
