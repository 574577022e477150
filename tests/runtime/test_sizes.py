"""Pictures that are no squares, of two sizes from one bundle, against diffusers' own pipelines."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from sd_engines.backends import onnxruntime
from sd_engines.errors import BackendError, ConfigError
from sd_runtime import Pipeline, Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import TinyModel

# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

ROWS, COLUMNS = np.mgrid[:16, :40]
PICTURE = np.stack([ROWS * 12, COLUMNS * 5, 255 - ROWS * 7], axis=-1).astype(np.uint8)
MASK = ((ROWS + COLUMNS > 30) * 255).astype(np.uint8)


TEXT = Request(("a red circle", "a cat", "a dog"), seed=7, num_inference_steps=3)
IMAGE = Request("a cat", seed=5, num_inference_steps=4, image=PICTURE, strength=0.6)
MASKED = replace(IMAGE, num_inference_steps=3, mask=MASK, strength=None, guidance_scale=5)
HIGH = {"height": 24, "width": 16}


@pytest.mark.parametrize(
    "request_",
    [TEXT, IMAGE, MASKED, replace(TEXT, **HIGH), replace(TEXT, height=16, width=40)],
    ids=["text", "image", "mask", "other size", "own size"],
)
def test_pictures_are_those_of_diffusers(sized_model: TinyModel, request_: Request) -> None:
    sized_model.assert_same(request_)


def test_a_picture_is_redrawn_in_its_size(sized_model: TinyModel) -> None:
    first = sized_model.pipeline.generate(replace(TEXT, **HIGH))
    recipe = first.recipes[1]
    assert (recipe.height, recipe.width) == (24, 16)
    own = sized_model.pipeline.generate(TEXT).recipes[1]
    manifest = sized_model.pipeline.bundle.manifest
    found = {size: manifest.at(*size).fingerprint for size in ((24, 16), (16, 40))}
    assert found == {(24, 16): recipe.fingerprint, (16, 40): own.fingerprint}
    again = sized_model.pipeline.generate(recipe.request())
    assert np.array_equal(again.pixels[0], first.pixels[1])


def test_a_picture_is_resized_to_the_size_asked_for(sized_model: TinyModel) -> None:
    request = replace(IMAGE, **HIGH)
    image = Image.fromarray(PICTURE).resize((16, 24), Image.Resampling.LANCZOS)
    resized = replace(request, image=np.asarray(image))
    drawn = [sized_model.pipeline.generate(each) for each in (request, resized)]
    assert drawn[0].pixels.shape == (1, 24, 16, 3)
    assert np.array_equal(drawn[0].pixels, drawn[1].pixels)


def test_engines_of_every_size_compute_in_one_thread_where_one_is_asked_for(
    sized_model: TinyModel,
) -> None:
    """Those that open with the first picture to start from, too."""

    def count() -> int:
        time.sleep(0.05)  # a thread that was joined is listed for a moment more
        return len(list(Path("/proc/self/task").iterdir()))

    before = count()
    with Pipeline.load(sized_model.bundle, backend="onnxruntime", threads=1) as pipeline:
        for request in (IMAGE, replace(IMAGE, **HIGH)):
            pipeline.generate(request)
        assert count() == before


def test_a_size_that_the_bundle_has_not(sized_model: TinyModel) -> None:
    with pytest.raises(ConfigError, match=r"draws 16×40, 24×16 .*, not 24×40") as caught:
        sized_model.pipeline.generate(replace(TEXT, height=24))
    assert "--size 40x24" in caught.value.hint


@pytest.mark.parametrize(
    "ask",
    [
        lambda pipeline: pipeline.generate(TEXT),
        lambda pipeline: pipeline.generate(replace(TEXT, **HIGH)),
        lambda pipeline: pipeline.use_loras([]),
    ],
    ids=["own size", "other size", "loras"],
)
def test_a_closed_pipeline_opens_nothing(
    sized_model: TinyModel, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Pipeline], object]
) -> None:
    with Pipeline.load(sized_model.bundle, threads=1) as pipeline:
        pass
    monkeypatch.setattr(onnxruntime, "load", lambda *_, **__: pytest.fail("an engine is opened"))
    with pytest.raises(BackendError, match="closed"):
        ask(pipeline)


def test_a_callers_buffer_is_for_the_size_asked_for(sized_model: TinyModel) -> None:
    from sd_runtime.embed.context import Context

    high = Request(("a cat", "a dog"), height=24, width=16)
    with Context(str(sized_model.bundle), threads=1, queue_size=1) as context:
        assert context.pixels_bytes(high) == 2 * 24 * 16 * 3
        assert context.pixels_bytes(Request("a cat")) == 16 * 40 * 3
        with pytest.raises(ConfigError, match="draws 16×40"):
            context.pixels_bytes(replace(high, height=40))
        profiles = context.info()["profiles"]
        assert [(each["height"], each["width"]) for each in profiles] == [(16, 40), (24, 16)]


@pytest.mark.parametrize(
    ("options", "word"), [(["--grid"], "--grid"), (["--save-latents", "l.npy"], "--save-latents")]
)
def test_what_holds_all_pictures_is_for_one_size(
    sized_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    word: str,
) -> None:
    from sd_runtime.cli import main

    monkeypatch.chdir(tmp_path)
    Path("two.jsonl").write_text(
        '{"prompt": "a cat"}\n{"prompt": "a dog", "height": 24, "width": 16}\n'
    )
    command = [str(sized_model.bundle), "--prompts-file", "two.jsonl", "-o", "a.png", *options]
    assert main([*command, "--num-inference-steps", "1", "--threads", "1"]) == 2
    assert f"{word} is for pictures of one size" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["two.jsonl"]
