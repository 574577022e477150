"""The folders of upscalers: what diffusers makes of them, and what is refused by name.

That their bundles draw as diffusers does is in tests/runtime, once they are exported.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sd_engines.errors import ConfigError, ExportError
from sd_export import export
from sd_export.oracle import load_pipeline
from sd_export.source import find_checkpoint
from tiny import change_json
from tiny_upscaler import make_latent_upscaler, make_upscaler

if TYPE_CHECKING:
    from pathlib import Path

# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.fixture(scope="module")
def latent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_latent_upscaler(tmp_path_factory.mktemp("upscaler") / "checkpoint")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_upscaler(tmp_path_factory.mktemp("upscaler") / "checkpoint")


def test_pipeline_of_diffusers_is_that_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    change_json(copy / "vae/config.json", scaling_factor=0.18215)  # as diffusers' default is
    change_json(copy / "model_index.json", max_noise_level=9)
    found = find_checkpoint(str(copy))
    pipeline = load_pipeline(found)
    assert type(pipeline).__name__ == "StableDiffusionUpscalePipeline"
    assert pipeline.vae.config["scaling_factor"] == 0.08333
    assert pipeline.config["max_noise_level"] == found.max_noise_level == 9
    assert type(pipeline.low_res_scheduler).__name__ == "DDPMScheduler"


def test_pipeline_of_diffusers_is_that_of_a_latent_upscaler(latent_folder: Path) -> None:
    import diffusers

    found = find_checkpoint(str(latent_folder))
    assert (found.family, found.max_noise_level) == ("stable-diffusion-x2-latent-upscaler", 0)
    assert found.prediction_type == "sample"  # of which original_sample is another name
    pipeline = load_pipeline(found)
    assert type(pipeline).__name__ == "StableDiffusionLatentUpscalePipeline"
    unet = diffusers.UNet2DConditionModel.from_pretrained(latent_folder / "unet")
    ours = dict(pipeline.unet.named_buffers())
    assert ours  # the kernels, which are in no file
    for name, kernel in unet.named_buffers():
        assert torch.equal(ours[name], kernel), name


def test_another_latent_upscaler_is_refused(latent_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(latent_folder, tmp_path / "copy")
    change_json(copy / "unet/config.json", time_cond_proj_dim=128 + 9)
    with pytest.raises(ExportError, match="not the pooled prompt and noise level"):
        find_checkpoint(str(copy))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("unet/config.json", {"num_class_embeds": None}, "an upscaler without its class labels"),
        ("unet/config.json", {"in_channels": 4}, "no picture beside them"),
        ("low_res_scheduler/scheduler_config.json", {"num_train_timesteps": 9}, "past the last"),
        ("low_res_scheduler/scheduler_config.json", {"beta_schedule": "odd"}, "'odd'"),
        ("low_res_scheduler/scheduler_config.json", None, "scheduler_config.json is missing"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(
    folder: Path, tmp_path: Path, file: str, changes: dict[str, Any] | None, words: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    if changes is None:
        (copy / file).unlink()
    else:
        change_json(copy / file, **changes)
    with pytest.raises(ExportError, match=words):
        find_checkpoint(str(copy))


def test_a_safety_checker_is_refused(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    for part in ("safety_checker", "feature_extractor"):
        shutil.copytree(checkpoint / part, copy / part)
    change_json(copy / "model_index.json", safety_checker=["diffusers", "SafetyChecker"])
    with pytest.raises(ExportError, match="an upscaler with a safety checker"):
        find_checkpoint(str(copy))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("folder", {"height": 40}, "a multiple of 16"),  # a small picture of 10 is 8 to diffusers
        ("latent_folder", {"width": 18}, "a multiple of 4"),
        ("folder", {"controlnets": ["controlnet"]}, "--controlnet with an upscaler"),
        ("latent_folder", {"controlnets": ["controlnet"]}, "--controlnet with an upscaler"),
        ("folder", {"feature_cache": True}, "sees more than latents"),
        ("latent_folder", {"feature_cache": True}, "KUpBlock2D cannot be cut"),
        ("folder", {"backends": ["openvino"], "precision": "int8"}, "takes a picture"),
        ("latent_folder", {"backends": ["openvino"], "precision": "int8"}, "takes a picture"),
    ],
)
def test_what_does_not_go_with_an_upscaler_is_refused_by_name(
    kind: str, options: dict[str, Any], words: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises((ConfigError, ExportError)) as caught:
        export(request.getfixturevalue(kind), tmp_path / "bundle", **options)
    assert words in f"{caught.value.message} {caught.value.hint}"
    assert not (tmp_path / "bundle").exists()
