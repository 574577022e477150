"""Image variations against diffusers' own pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from sd_engines.bundle import open_bundle
from sd_engines.errors import ConfigError
from sd_export.triton import write_model_repository
from sd_runtime import Pipeline, Request
from sd_runtime.cli import main
from sd_runtime.plan import plan
from sd_runtime.serve.offer import first_request
from sd_runtime.task import plainest_request, tasks_of

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import TinyModel

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def picture(width: int = 40, height: int = 25, *, mode: str = "RGB") -> Image.Image:
    """Of another size than the bundle's, and of another shape than the encoder sees."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    resized = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return resized.convert(mode)


def request_for(**options: Any) -> Request:
    defaults = {"seed": 8, "num_inference_steps": 4, "image": picture()}
    return Request("", **{**defaults, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_images_per_prompt": 3, "guidance_scale": 3.0},
        {"guidance_scale": 1.0, "image": picture(24, 61, mode="L")},
        {"image": picture(28, 28)},
    ],
    ids=["defaults", "several", "no guidance", "fits"],
)
def test_the_picture_is_diffusers(variation_model: TinyModel, options: dict[str, Any]) -> None:
    request = request_for(**options)
    result = variation_model.pipeline.generate(request)
    oracle = variation_model.oracle
    given = {} if request.guidance_scale is None else {"guidance_scale": request.guidance_scale}
    images = oracle(
        request.image.image.convert("RGB"),
        num_images_per_prompt=request.num_images,
        num_inference_steps=request.num_inference_steps,
        generator=[torch.Generator("cpu").manual_seed(image.seed) for image in request.images()],
        output_type="np",
        **given,
    ).images
    pixels = (images * 255).round().astype(int)
    assert result.pixels.shape == pixels.shape
    assert (np.abs(result.pixels.astype(int) - pixels) <= 1).mean() >= 0.999


def test_another_picture_is_another_variation(variation_model: TinyModel) -> None:
    draw = variation_model.pipeline.generate
    one, other = (
        draw(request_for(image=image)).pixels.astype(int)
        for image in (picture(), Image.new("RGB", (9, 9), "white"))
    )
    assert np.abs(one - other).max() > 8


def test_the_bundle_says_what_it_is_for(variation_model: TinyModel, tmp_path: Path) -> None:
    manifest = open_bundle(variation_model.bundle).manifest
    assert set(manifest.components) == {"image_encoder", "unet", "vae_decoder"}
    proven = {entry.component: entry.figure for entry in manifest.certificate}
    assert proven.keys() == {*manifest.components, "end_to_end"}
    assert proven["image_encoder"] <= 1e-4
    assert proven["end_to_end"] >= 0.999
    assert tasks_of(manifest) == ("image-variation",)
    assert plan(plainest_request(manifest), manifest).task.name == "image-variation"
    assert manifest.model.family == "stable-diffusion-v1"
    assert manifest.model.max_prompt_tokens == 1
    specs = manifest.components["image_encoder"]
    assert [(spec.name, spec.shape) for spec in (*specs.inputs, *specs.outputs)] == [
        ("images", ("batch", 28, 28, 3)),
        ("image_embeds", ("batch", 1, 8)),
    ]
    with pytest.raises(ConfigError, match="the bundle is for image-variation"):
        write_model_repository(variation_model.bundle, tmp_path / "models", backend=None)
    with pytest.raises(ConfigError, match="every door here asks for a prompt"):
        first_request(manifest)


def test_a_picture_is_read_once(variation_model: TinyModel) -> None:
    with Pipeline.load(variation_model.bundle, threads=1, request=request_for()) as pipeline:
        assert set(pipeline.engines) == {"image_encoder", "unet", "vae_decoder"}
        first = pipeline.generate(request_for(num_images_per_prompt=3)).timings
        assert len(first.runs_ms("image_encoder")) == 1
        assert pipeline.generate(request_for()).timings.runs_ms("image_encoder") == []
        pipeline.forget_prompts()
        assert len(pipeline.generate(request_for()).timings.runs_ms("image_encoder")) == 1


def test_drawn_again_from_the_command_line(
    variation_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, first, second = (tmp_path / name for name in ("image.png", "first.png", "second.png"))
    picture().save(image)
    bundle, given = str(variation_model.bundle), ["--image", str(image)]
    quick = ["--num-inference-steps", "2", "--seed", "1", "--threads", "1"]
    assert main([bundle, "-o", str(first), *given, *quick]) == 0
    again = [bundle, "--from-image", str(first), "-o", str(second), "--threads", "1"]
    assert main([*again, *given]) == 0
    assert first.read_bytes() == second.read_bytes()
    capsys.readouterr()
    assert main(again) == 2
    assert "--image FILE" in capsys.readouterr().err
    assert main([bundle, "a cat", "-o", str(second), *given]) == 2
    assert "reads that, and no prompt" in capsys.readouterr().err
    assert main([bundle, "-o", str(second)]) == 2
    assert "--image PICTURE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "draws variations of a picture"),
        ({"negative_prompt": "red"}, "and no prompt"),
        ({"mask": Image.new("L", (40, 25), "white")}, "^mask with a bundle that draws variations"),
        ({"strength": 0.5}, "^strength with a bundle that draws variations"),
        ({"noise_level": 20}, "^noise_level with a bundle that draws variations"),
        ({"depth_map": np.eye(3)}, "^depth_map with a bundle that draws variations"),
        ({"control_image": picture()}, "no ControlNet"),
        ({"cache_interval": 2}, "no shallow UNet"),
    ],
)
def test_what_cannot_be_asked(
    variation_model: TinyModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        variation_model.pipeline.stream(request_for(**options))


def test_loras_are_refused(variation_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "style.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="reads a picture instead"):
        Pipeline.load(variation_model.bundle, loras=[str(tmp_path / "style.safetensors")])
