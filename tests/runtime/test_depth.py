"""Depth to image against diffusers' own pipeline, and depth maps against torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from sd_engines.bundle import open_bundle
from sd_engines.errors import BundleError, ConfigError
from sd_export.triton import write_model_repository
from sd_runtime import Pipeline, Request
from sd_runtime.cli import main
from sd_runtime.depth_map import DepthMap
from sd_runtime.plan import plan
from sd_runtime.task import plainest_request, tasks_of

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import TinyModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # of diffusers' pipeline
]


def picture(seed: int = 0, *, size: int = 24) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def depths(height: int, width: int) -> np.ndarray:
    """Metres, or the like."""
    return np.random.default_rng(1).uniform(0.5, 9, (height, width)).astype(np.float32)


def request_for(**options: Any) -> Request:
    defaults = {"seed": 8, "num_inference_steps": 5, "guidance_scale": 3.0, "image": picture()}
    return Request(options.pop("prompt", "a cat"), **{**defaults, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strength": 0.4, "scheduler": "euler_a", "negative_prompt": "red"},
        {"strength": 1.0, "scheduler": "unipc", "guidance_scale": 1.0},
        {"prompt": ("a cat", "a dog"), "num_images_per_prompt": 2, "strength": 0.5},
        {"depth_map": depths(3, 31)},
        {"depth_map": depths(24, 24), "num_images_per_prompt": 3, "strength": 0.5},
    ],
    ids=["defaults", "euler_a", "unipc", "several", "given", "several given"],
)
def test_the_picture_is_diffusers(depth_model: TinyModel, options: dict[str, Any]) -> None:
    depth_model.assert_same(request_for(**options))


def test_another_depth_is_another_picture(depth_model: TinyModel) -> None:
    requests = [request_for(depth_map=given) for given in (None, depths(24, 24), -depths(24, 24))]
    drawn = [depth_model.pipeline.generate(request).pixels.astype(int) for request in requests]
    for one, other in zip(drawn, [*drawn[1:], drawn[0]], strict=True):
        assert np.abs(one - other).max() > 8


def test_the_bundle_says_what_it_is_for(depth_model: TinyModel, tmp_path: Path) -> None:
    manifest = open_bundle(depth_model.bundle).manifest
    inputs = {spec.name: spec.shape for spec in manifest.components["unet"].inputs}
    assert inputs["sample"] == ("pictures", 4, 12, 12)
    assert inputs["depth_mask"] == ("pictures", 1, 12, 12)
    proven = {entry.component: entry.figure for entry in manifest.certificate}
    assert proven.keys() == {*manifest.components, "end_to_end"}
    assert proven["depth_estimator"] <= 1e-4
    assert proven["end_to_end"] >= 0.999
    assert manifest.model.family == "stable-diffusion-v2"
    specs = manifest.components["depth_estimator"]
    assert [(spec.name, spec.shape) for spec in (*specs.inputs, *specs.outputs)] == [
        ("images", ("batch", 24, 24, 3)),
        ("depth_mask", ("batch", 1, 12, 12)),
    ]
    with pytest.raises(ConfigError, match="the bundle is for depth-to-image"):
        write_model_repository(depth_model.bundle, tmp_path / "models", backend=None)
    assert tasks_of(manifest) == ("depth-to-image",)
    assert plan(plainest_request(manifest), manifest).task.name == "depth-to-image"
    assert plan(request_for(), manifest).request.strength == 0.8


def test_a_depth_is_estimated_once_and_not_where_it_is_given(depth_model: TinyModel) -> None:
    with Pipeline.load(depth_model.bundle, threads=1) as pipeline:
        pipeline.generate(request_for(depth_map=depths(9, 9)))
        assert "depth_estimator" not in pipeline.engines
        first = pipeline.generate(request_for(num_images_per_prompt=3)).timings
        assert len(first.runs_ms("depth_estimator")) == 1
        assert pipeline.generate(request_for()).timings.runs_ms("depth_estimator") == []
    with Pipeline.load(depth_model.bundle, threads=1, request=request_for()) as pipeline:
        assert "depth_estimator" in pipeline.engines


@pytest.mark.parametrize("sizes", [((24, 24), (12, 12)), ((3, 31), (8, 8)), ((2, 5), (5, 3))])
def test_maps_are_resized_as_torch_does(
    sizes: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    given, wanted = sizes
    values = depths(*given)
    found = DepthMap.of(values, name="depth_map").normalized(*wanted)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], wanted, mode="bicubic", align_corners=False
    )[0]
    expected = 2 * (resized - resized.min()) / (resized.max() - resized.min()) - 1
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)


def test_maps_are_read_from_whatever_holds_numbers(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (6, 5), dtype=np.uint16)
    np.save(tmp_path / "map.npy", values)
    Image.fromarray(values).save(tmp_path / "map.png")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "map.tif")
    wanted = DepthMap.of(values, name="depth_map")
    np.testing.assert_array_equal(wanted.values, values)
    for name in ("map.npy", "map.png"):
        assert DepthMap.of(tmp_path / name, name="depth_map") == wanted
    unknown_range = DepthMap.of(tmp_path / "map.tif", name="depth_map")
    np.testing.assert_array_equal(unknown_range.values, values)
    low = (values >> 8).astype(np.uint8)
    of_each_range = [DepthMap.of(low.astype(kind), name="m") for kind in (float, "u1", "u2")]
    assert len({unknown_range, wanted, *of_each_range}) == 5, "an upscaler reads them differently"
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    eight = DepthMap.of(grey, name="depth_map")
    assert DepthMap.of(grey.convert("RGB"), name="depth_map") == eight != wanted


def test_a_map_stays_as_it_was_given(tmp_path: Path) -> None:
    values = depths(4, 5)
    np.save(tmp_path / "map.npy", values)
    given = [DepthMap.of(source, name="m") for source in (values, tmp_path / "map.npy")]
    before = values.copy()
    values[:] = 0
    np.save(tmp_path / "map.npy", values)
    for depth_map in given:
        np.testing.assert_array_equal(depth_map.values, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((3, 3)), "depth_map is equally near everywhere"),
        (np.full((3, 3), np.nan), "not finite"),
        (np.zeros((3, 3, 3)), "no depth map, but float64 of shape"),
        (np.array([["a"]]), "no depth map"),
        (np.zeros((0, 3)), "no depth map"),
        (Image.new("RGB", (2, 2), "red"), "in colours"),
        ("nowhere.png", r"cannot read the picture nowhere\.png"),
        ("nowhere.npy", r"cannot read the picture nowhere\.npy"),
        (b"bytes", "depth_map is no picture but bytes"),
    ],
    ids=str,
)
def test_maps_that_are_none(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request_for(depth_map=given)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04"])
def test_broken_files_of_numbers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "map.npy").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read the picture .*map\.npy"):
        request_for(depth_map=tmp_path / "map.npy")


def test_a_map_whose_depth_is_lost(depth_model: TinyModel) -> None:
    dot = np.zeros((999, 999))
    dot[1, 1] = 1
    with pytest.raises(ConfigError, match="once resized"):
        depth_model.pipeline.generate(request_for(depth_map=dot))


def test_what_cannot_be_asked(depth_model: TinyModel, tiny_model: TinyModel) -> None:
    draw = depth_model.pipeline.stream
    with pytest.raises(ConfigError, match="depth to image: it takes a picture") as caught:
        draw(Request("a cat"))
    assert "--image PICTURE" in caught.value.hint
    with pytest.raises(ConfigError, match="takes a picture, and no mask"):
        draw(request_for(mask=Image.new("L", (24, 24), "white")))
    with pytest.raises(ConfigError, match="a depth map without a picture"):
        request_for(image=None, depth_map=depths(3, 3))
    with pytest.raises(ConfigError, match="the bundle's UNet sees none") as caught:
        tiny_model.pipeline.stream(request_for(depth_map=depths(3, 3)))
    assert "stabilityai/stable-diffusion-2-depth" in caught.value.hint
    with pytest.raises(ConfigError, match="no ControlNet"):
        draw(request_for(control_image=picture()))
    with pytest.raises(ConfigError, match="no shallow UNet"):
        draw(request_for(cache_interval=2))


def test_a_bundle_without_an_estimator_draws_from_given_depths(depth_model: TinyModel) -> None:
    manifest = open_bundle(depth_model.bundle).manifest
    components = {n: c for n, c in manifest.components.items() if n != "depth_estimator"}
    without = replace(manifest, components=components)
    assert plan(request_for(depth_map=depths(3, 3)), without).task.name == "depth-to-image"
    with pytest.raises(BundleError, match="no depth_estimator"):
        plan(request_for(), without)


def test_drawn_again_from_the_command_line(
    depth_model: TinyModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    image, depth, other = (tmp_path / name for name in ("image.png", "depth.npy", "other.npy"))
    picture().save(image)
    np.save(depth, depths(7, 9))
    np.save(other, depths(9, 7))
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    quick = ["--num-inference-steps", "2", "--seed", "1", "--threads", "1"]
    given = ["--image", str(image), "--depth-map", str(depth)]
    bundle = str(depth_model.bundle)
    assert main([bundle, "a cat", "-o", str(first), *given, *quick]) == 0
    again = [bundle, "--from-image", str(first), "-o", str(second), "--threads", "1"]
    capsys.readouterr()
    assert main([*again, *given[:2]]) == 2
    assert "--depth-map FILE" in capsys.readouterr().err
    assert main([*again, *given]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert main([*again, *given[:3], str(other)]) == 0
    assert first.read_bytes() != second.read_bytes()
    assert "another depth_map than" in caplog.text
