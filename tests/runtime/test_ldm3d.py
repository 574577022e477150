"""LDM3D: pictures and their depth maps, against diffusers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from ldm3d import ldm3d_expected
from sd_engines.errors import ConfigError
from sd_runtime import Request
from sd_runtime.batch import split_result
from sd_runtime.cli import main
from sd_runtime.image import read_recipe_text
from sd_runtime.recipe import recipes_from_text
from sd_runtime.task import tasks_of

if TYPE_CHECKING:
    from conftest import TinyModel

# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

REQUEST = Request(("a red circle", "a cat", "a dog"), seed=7, num_inference_steps=3)


def test_pictures_and_depth_are_those_of_diffusers(ldm3d_model: TinyModel) -> None:
    assert type(ldm3d_model.oracle).__name__ == "StableDiffusionLDM3DPipeline"
    pixels, depth, latents = ldm3d_expected(ldm3d_model.oracle, REQUEST)
    flags = _flags(ldm3d_model, pixels)
    result = ldm3d_model.pipeline.generate(REQUEST)
    assert np.linalg.norm(result.latents - latents) <= 1e-4 * np.linalg.norm(latents)
    assert result.nsfw_content_detected == flags
    for flag in np.flatnonzero(flags or ()):
        pixels[flag], depth[flag] = 0, 0
    assert (np.abs(result.pixels.astype(int) - pixels) <= 1).mean() >= 0.999
    assert result.depth is not None
    assert (result.depth.dtype, result.depth.shape) == (np.uint16, (3, 16, 16))
    assert len(np.unique(depth)) > 100
    assert (np.abs(result.depth.astype(int) - depth) <= 1).mean() >= 0.99
    high, wanted = result.depth >> 8, depth >> 8  # the byte that a picture of depth counts in
    assert (np.abs(high.astype(int) - wanted) <= 1).mean() >= 0.999


def _flags(ldm3d_model: TinyModel, pixels: np.ndarray) -> tuple[bool, ...] | None:
    """What diffusers' safety checker says of ``pixels``; some of each, where there is one."""
    oracle = ldm3d_model.oracle
    if oracle.safety_checker is None:
        return None
    pictures = [Image.fromarray(picture) for picture in pixels]
    inputs = oracle.feature_extractor(pictures, return_tensors="pt").pixel_values
    _, flags = oracle.safety_checker(images=list(pixels), clip_input=inputs)
    assert 0 < sum(flags) < len(flags)
    return tuple(map(bool, flags))


def test_files_lie_beside_each_other(
    ldm3d_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(ldm3d_model.bundle), "a cat", "a dog"]
    arguments += ["--seed", "7", "--num-inference-steps", "2"]
    output = ["--threads", "1", "--output", str(tmp_path / "picture.png")]
    assert main([*arguments, *output, "--json"]) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    assert [image["depth_file"] for image in images] == [
        str(tmp_path / f"picture-{index}.depth.png") for index in range(2)
    ]
    expected = ldm3d_model.pipeline.generate(
        Request(("a cat", "a dog"), seed=7, num_inference_steps=2)
    ).depth
    assert expected is not None
    for image, depth in zip(images, expected, strict=True):
        with Image.open(image["depth_file"]) as picture:
            assert picture.mode == "I;16"
            np.testing.assert_array_equal(np.asarray(picture), depth)
        recipes = [
            recipes_from_text(read_recipe_text(Path(image[name])))
            for name in ("file", "depth_file")
        ]
        assert recipes[0] == recipes[1]
    assert main([*arguments, *output, "--grid"]) == 0
    with Image.open(tmp_path / "picture.depth.png") as grid:
        np.testing.assert_array_equal(np.asarray(grid), np.concatenate(expected, axis=1))


def test_jobs_write_depth_and_resume(
    ldm3d_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs.txt").write_text("a cat\na dog\n")
    arguments = [str(ldm3d_model.bundle), "--jobs", str(tmp_path / "jobs.txt"), "--threads", "1"]
    arguments += ["--output", str(tmp_path / "out"), "--num-inference-steps", "1", "--resume"]
    assert main(arguments) == 0
    pictures = [path.removesuffix(".png") for path in capsys.readouterr().out.split()]
    written = sorted((tmp_path / "out").iterdir())
    assert written == sorted(
        tmp_path / "out" / f"{name}{suffix}"
        for name in pictures
        for suffix in (".png", ".depth.png")
    )
    assert main(arguments) == 0
    assert "There already: 2" in capsys.readouterr().err


def test_shared_batches_are_split_with_their_depth(ldm3d_model: TinyModel) -> None:
    together = ldm3d_model.pipeline.generate(REQUEST)
    singles = [
        Request(image.prompt, seed=image.seed, num_inference_steps=3) for image in REQUEST.images()
    ]
    for index, part in enumerate(split_result(together, singles)):
        assert together.depth is not None
        assert part.depth is not None
        np.testing.assert_array_equal(part.depth, together.depth[index : index + 1])


def test_a_picture_to_begin_with_is_refused(ldm3d_model: TinyModel) -> None:
    assert tasks_of(ldm3d_model.pipeline.bundle.manifest) == ("text-to-image",)
    picture = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ConfigError, match="LDM3D, which draws from text alone") as caught:
        ldm3d_model.pipeline.stream(Request("a cat", image=picture))
    assert "--model Intel/ldm3d-sr" in caught.value.hint
    given = Request("a cat", image=picture, depth_map=np.array([[0, 1]]))
    with pytest.raises(ConfigError, match="a depth map") as caught:
        ldm3d_model.pipeline.stream(given)
    assert "--model Intel/ldm3d-sr" in caught.value.hint


def test_a_depth_map_that_cannot_be_written_is_refused_first(
    ldm3d_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "picture.depth.png").mkdir()
    output = str(tmp_path / "picture.png")
    assert main([str(ldm3d_model.bundle), "a cat", "--output", output]) == ConfigError.exit_code
    assert "picture.depth.png is a folder" in capsys.readouterr().err
