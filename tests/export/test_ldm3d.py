"""LDM3D's checkpoints and its upscaler's: what their bundles hold, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ldm3d import DEPTH, PICTURE, UPSCALED, make_ldm3d_checkpoint, upscaled_expected
from sd_engines.errors import ConfigError, ExportError
from sd_engines.spec import Defaults, Profile
from sd_export import export
from sd_export.borders import borders
from sd_export.oracle import ldm3d_upscaler_inputs, load_pipeline
from sd_export.source import find_checkpoint
from sd_runtime import Request
from tiny import SMALLEST, change_json, make_smallest_checkpoint
from tiny_upscaler import make_ldm3d_upscaler

if TYPE_CHECKING:
    from pathlib import Path


def test_the_bundle_paints_depth_and_is_proven(tmp_path: Path) -> None:
    checkpoint = make_ldm3d_checkpoint(tmp_path / "ldm3d", channels=6, **SMALLEST)
    manifest = export(checkpoint, tmp_path / "bundle", backends=("openvino",)).manifest
    assert manifest.model.defaults == Defaults(num_inference_steps=49, guidance_scale=5.0)
    assert "vae_encoder" not in manifest.components
    images, depth = manifest.components["vae_decoder"].outputs
    assert (images.name, images.shape) == ("images", ("batch", 8, 8, 3))
    assert (depth.name, depth.shape) == ("depth", ("batch", 8, 8, 3))
    (proof,) = (entry for entry in manifest.certificate if entry.component == "end_to_end")
    assert proof.metric == "pixels_within_1"
    assert proof.figure >= 0.999


@pytest.mark.parametrize(
    ("pipeline", "channels"),
    [("StableDiffusionPipeline", 4), ("StableDiffusionLDM3DPipeline", 5)],
)
def test_other_channels_of_pictures_are_refused(
    tmp_path: Path, pipeline: str, channels: int
) -> None:
    folder = make_smallest_checkpoint(tmp_path / "checkpoint")
    for name, changes in (
        ("model_index.json", {"_class_name": pipeline}),
        ("vae/config.json", {"out_channels": channels}),
    ):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | changes))
    with pytest.raises(ExportError, match=f"its VAE paints {channels} channels for {pipeline}"):
        find_checkpoint(str(folder))


def test_what_does_not_go_with_depth_is_refused_by_name(smallest: Path, tmp_path: Path) -> None:
    checkpoint = make_ldm3d_checkpoint(tmp_path / "ldm3d", channels=4, **SMALLEST)
    with pytest.raises(ExportError, match=r"it has 3 channels of pictures, .* own 4"):
        export(checkpoint, tmp_path / "bundle", vae=str(smallest))
    with pytest.raises(ConfigError, match="--controlnet with an LDM3D"):
        export(checkpoint, tmp_path / "bundle", controlnets=["some/controlnet"])
    assert not (tmp_path / "bundle").exists()


@pytest.fixture
def upscaler(tmp_path: Path) -> Path:
    return make_ldm3d_upscaler(tmp_path / "upscaler")


SIZE = Profile(batch_size=1, height=16, width=24, vae_scale_factor=2)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers, of numpy
def test_what_stands_for_its_pipeline_draws_the_same(upscaler: Path) -> None:
    expected, found = upscaled_expected(), find_checkpoint(str(upscaler))
    pipeline = load_pipeline(found)
    for name in ("vae", "unet", "text_encoder"):
        weights = getattr(pipeline, name).parameters()
        total = sum(float(weight.detach().double().abs().sum()) for weight in weights)
        assert total == pytest.approx(float(expected[name]), rel=1e-5)
    for case, options in enumerate(UPSCALED[:2]):
        generator = torch.Generator("cpu").manual_seed(7)
        request = Request("a red circle", image=PICTURE, depth_map=DEPTH, **options)
        with torch.inference_mode():
            inputs = ldm3d_upscaler_inputs(
                pipeline, request, checkpoint=found, profile=SIZE, generator=generator
            )
            latents = pipeline(
                "a red circle",
                num_inference_steps=request.num_inference_steps,
                guidance_scale=options.get("guidance_scale", 9.0),
                generator=generator,
                output_type="latent",
                **inputs,
            ).images
        np.testing.assert_allclose(latents.numpy(), expected[f"latents_{case}"], atol=1e-4)


def test_it_draws_the_size_of_its_pipeline(upscaler: Path) -> None:
    assert find_checkpoint(str(upscaler)).default_size == (1024, 1024)


def test_its_upscaler_may_have_a_safety_checker(upscaler: Path, checkpoint: Path) -> None:
    for part in ("safety_checker", "feature_extractor"):
        shutil.copytree(checkpoint / part, upscaler / part)
    change_json(upscaler / "model_index.json", safety_checker=["diffusers", "SafetyChecker"])
    assert "safety_checker" in find_checkpoint(str(upscaler)).weights


def test_an_upscaler_whose_unet_has_no_labels_is_told_of_no_noise(upscaler: Path) -> None:
    change_json(upscaler / "unet/config.json", "num_class_embeds")
    found = find_checkpoint(str(upscaler))
    assert (found.family, found.max_noise_level) == ("ldm3d-upscaler", 0)
    inputs, _ = borders("unet", checkpoint=found, profile=SIZE)
    assert [spec.name for spec in inputs[3:]] == ["image_latents"]


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("vae/config.json", {"out_channels": 6}, "its VAE paints 6 channels for .*UpscaleLDM3D"),
        ("vae/config.json", {"in_channels": 3}, "its VAE takes 3 channels and paints 4"),
        ("unet/config.json", {"in_channels": 4}, "takes class labels"),
        (
            "unet/config.json",
            {"in_channels": 4, "num_class_embeds": None},
            "its UNet takes 4 channels for StableDiffusionUpscaleLDM3DPipeline",
        ),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionLDM3DPipeline"},
            "its UNet takes 8 channels for StableDiffusionLDM3DPipeline",
        ),
    ],
)
def test_what_is_wrong_with_an_upscaler_is_named(
    upscaler: Path, file: str, changes: dict[str, Any], words: str
) -> None:
    change_json(upscaler / file, **changes)
    with pytest.raises(ExportError, match=words):
        find_checkpoint(str(upscaler))


def test_what_does_not_go_with_its_upscaler_is_refused_by_name(
    upscaler: Path, tmp_path: Path
) -> None:
    for options, words in (
        ({"controlnets": ["some/controlnet"]}, "--controlnet with an upscaler"),
        ({"vae_tiling": True}, "--vae-tiling is not for upscalers"),
        ({"feature_cache": True}, "sees more than latents"),
        ({"backends": ["openvino"], "precision": "int8"}, "takes a picture"),
        ({"height": 20}, "a multiple of 8"),
    ):
        given: dict[str, Any] = options
        with pytest.raises((ConfigError, ExportError)) as caught:
            export(upscaler, tmp_path / "bundle", **given)
        assert words in f"{caught.value.message} {caught.value.hint}"
    assert not (tmp_path / "bundle").exists()
