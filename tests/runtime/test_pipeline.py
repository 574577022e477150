"""Pictures against unmodified diffusers.StableDiffusionPipeline, and what a pipeline refuses."""

from __future__ import annotations

import itertools
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from pictures import recipe_in
from sd_engines.bundle import hash_files, open_bundle, portable_entry
from sd_engines.errors import BackendError, BundleError, ConfigError
from sd_engines.seal import seal
from sd_runtime import Pipeline, Request
from sd_runtime.scheduler_config import SCHEDULERS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import TinyModel

MAX_SEED = 2**64 - 1
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.mark.parametrize(
    "request_",
    [
        Request("a red circle", seed=7, num_inference_steps=4),
        Request("a red circle", seed=7, num_inference_steps=1),
        Request("", seed=0, num_inference_steps=2),
        Request("a cat", negative_prompt="a dog", seed=MAX_SEED, num_inference_steps=3),
        Request("a cat", seed=1, guidance_scale=1.0, num_inference_steps=3),
        Request("a cat", seed=1, guidance_scale=-3, num_inference_steps=3),
        Request("a cat", seed=1, guidance_scale=1.01, num_inference_steps=3),
        Request("a cat", seed=2**32 + 5, num_images_per_prompt=3, num_inference_steps=3),
        Request(
            ("a cat", "a dog", "a horse"),
            negative_prompt=("red", "", "blue"),
            seed=11,
            num_images_per_prompt=2,
            num_inference_steps=2,
        ),
        Request(("a cat", "a dog"), seed=3, guidance_scale=0, num_inference_steps=2),
        Request("control\x00\x1b characters\n\n", seed=3, num_inference_steps=2),
        Request("a cat " * 200, seed=3, num_inference_steps=2),
    ],
    ids=itertools.count(),
)
def test_same_picture_as_diffusers(tiny_model: TinyModel, request_: Request) -> None:
    tiny_model.assert_same(request_)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_same_picture_with_every_scheduler(tiny_model: TinyModel, name: str) -> None:
    request = Request(
        ("a cat", "a dog"), negative_prompt="red", seed=8, scheduler=name, num_inference_steps=4
    )
    tiny_model.assert_same(request)


@pytest.mark.parametrize("name", ["ddim", "tcd"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_same_picture_with_eta(tiny_model: TinyModel, name: str, eta: float) -> None:
    request = Request("a cat", seed=5, scheduler=name, eta=eta, num_inference_steps=3)
    tiny_model.assert_same(request)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers says what it corrects
def test_old_scheduler_configs_are_corrected_as_in_diffusers(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    scheduler = diffusers.DDIMScheduler.from_config(
        tiny_model.oracle.scheduler.config, clip_sample=True, steps_offset=0
    )
    config = {**scheduler.config, "_class_name": "DDIMScheduler"}
    oracle = diffusers.StableDiffusionPipeline(
        **{**tiny_model.oracle.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    oracle.set_progress_bar_config(disable=True)
    path, staging = tmp_path / "bundle", tmp_path / "staging"
    shutil.copytree(tiny_model.bundle, staging)
    (staging / "bundle.json").unlink()
    manifest = open_bundle(tiny_model.bundle).manifest
    seal(staging, path, replace(manifest, model=replace(manifest.model, scheduler=config)))
    with Pipeline.load(path, threads=1) as pipeline:
        model = replace(tiny_model, oracle=oracle, pipeline=pipeline)
        model.assert_same(Request("a cat", seed=5, num_inference_steps=4))


@pytest.mark.parametrize("steps", [1, 5])
def test_same_picture_in_another_shape(guarded_model: TinyModel, steps: int) -> None:
    request = Request(
        ("a red cat", "a dog on white", "a horse"), seed=4, num_inference_steps=steps, eta=0.0
    )
    guarded_model.assert_same(request)


def test_the_safety_checker_reports_and_blackens(
    guarded_model: TinyModel, suspect: Request
) -> None:
    result = guarded_model.pipeline.generate(suspect)
    pixels, _, flags = guarded_model.expected(suspect)
    assert flags is not None
    assert 0 < sum(flags) < len(flags), "the oracle must flag some pictures and pass others"
    assert result.nsfw_content_detected == tuple(flags)
    for flag, image, expected in zip(flags, result.pixels, pixels, strict=True):
        assert (image == 0).all() == flag
        assert (expected == 0).all() == flag


def test_a_batch_equals_its_pictures_alone(tiny_model: TinyModel) -> None:
    request = Request(
        "a cat", seed=20, num_images_per_prompt=3, num_inference_steps=3, scheduler="euler_a"
    )
    together = tiny_model.pipeline.generate(request)
    for index in range(3):
        solo = replace(request, seed=20 + index, num_images_per_prompt=1)
        alone = tiny_model.pipeline.generate(solo)
        np.testing.assert_allclose(together.latents[index], alone.latents[0], atol=1e-5)
        assert np.abs(together.pixels[index].astype(int) - alone.pixels[0]).max() <= 1


def test_a_recipe_draws_the_same_pixels(tiny_model: TinyModel, tmp_path: Path) -> None:
    request = Request("a cat", negative_prompt="red", seed=9, num_inference_steps=2)
    result = tiny_model.pipeline.generate(request)
    (path,) = result.save(tmp_path / "cat.png")
    recipe = recipe_in(path)
    assert recipe == result.recipes[0]
    assert recipe.scheduler
    assert recipe.backend == "onnxruntime"
    again = tiny_model.pipeline.generate(recipe.request())
    np.testing.assert_array_equal(again.pixels, result.pixels)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), result.pixels[0])
    np.testing.assert_array_equal(np.asarray(result.images[0]), result.pixels[0])


def test_several_pictures_are_saved_with_their_own_recipes(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    request = Request("a cat", seed=9, num_images_per_prompt=2, num_inference_steps=1)
    paths = tiny_model.pipeline.generate(request).save(tmp_path / "cat.webp")
    assert [path.name for path in paths] == ["cat-0.webp", "cat-1.webp"]
    seeds = [recipe_in(path).seed for path in paths]
    assert seeds == [9, 10]


def test_a_format_in_any_case_is_the_same_file(tiny_model: TinyModel) -> None:
    result = tiny_model.pipeline.generate(Request("a cat", seed=9, num_inference_steps=1))
    for names in (("PNG", "png"), ("JPEG", "jpeg", "jpg"), ("WEBP", "webp")):
        assert len({result.encode(0, name) for name in names}) == 1, names
    with pytest.raises(ConfigError, match="'bmp' is no known picture format"):
        result.encode(0, "bmp")


def test_without_a_seed_one_is_drawn(tiny_model: TinyModel) -> None:
    request = Request("a cat", num_inference_steps=1)
    first, second = (tiny_model.pipeline.generate(request) for _ in range(2))
    assert first.request.seed is not None
    assert first.request.seed != second.request.seed
    again = tiny_model.pipeline.generate(first.request)
    np.testing.assert_array_equal(first.pixels, again.pixels)


def test_every_step_is_shown(tiny_model: TinyModel) -> None:
    request = Request(
        "a cat", seed=2, num_images_per_prompt=3, num_inference_steps=3, scheduler="ddim"
    )
    previews, steps = [], []
    for step in tiny_model.pipeline.stream(request):
        steps.append((step.index, step.num_steps, step.first_image, len(step.latents)))
        previews.append(step.preview())
        last = step
    assert steps == [(i, 6, 0 if i < 3 else 2, 2 if i < 3 else 1) for i in range(6)]
    assert last.result is not None
    assert last.timestep < 500
    assert previews[-1].shape == (1, 64, 64, 3)
    # DDIM's last update goes (all but) to the prediction itself, so the last preview is the picture
    difference = previews[-1].astype(int) - last.result.pixels[2:]
    assert np.abs(difference).mean() < 2
    assert np.abs(previews[3].astype(int) - last.result.pixels[2:]).mean() > 2


def test_closing_the_stream_cancels(tiny_model: TinyModel) -> None:
    steps = tiny_model.pipeline.stream(Request("a cat", seed=2, num_inference_steps=500))
    assert next(steps).index == 0
    steps.close()
    assert next(steps, None) is None
    tiny_model.assert_same(Request("a cat", seed=2, num_inference_steps=2))


def test_threads_get_their_own_pictures(tiny_model: TinyModel) -> None:
    requests = [Request(text, seed=2, num_inference_steps=20) for text in ("a cat", "a dog")] * 4
    alone = [tiny_model.pipeline.generate(request).pixels for request in requests]
    with ThreadPoolExecutor(4) as pool:
        at_once = [drawn.pixels for drawn in pool.map(tiny_model.pipeline.generate, requests)]
    np.testing.assert_array_equal(at_once, alone)


def test_a_stream_ends_where_another_request_begins(tiny_model: TinyModel) -> None:
    request = Request("a cat", seed=2, num_inference_steps=3)
    first, second = (tiny_model.pipeline.stream(request) for _ in range(2))
    step = next(first)
    tiny_model.assert_same(replace(request, prompt="a dog"))
    with pytest.raises(ConfigError, match="another request"):
        step.preview()
    with pytest.raises(ConfigError, match="another request"):
        next(first)
    assert next(second).index == 0
    tiny_model.pipeline.use_loras(())
    with pytest.raises(ConfigError, match="other LoRAs"):
        next(second)
    tiny_model.assert_same(request)


def test_timings(tiny_model: TinyModel) -> None:
    request = Request("a horse riding a dog", seed=2, num_inference_steps=4, scheduler="euler")
    timings = tiny_model.pipeline.generate(request).timings
    totals = timings.totals_ms()
    assert set(totals) == {
        "tokenize", "text_encoder", "noise", "model_input", "unet", "scheduler", "vae_decoder",
        "total",
    }  # fmt: skip
    assert len(timings.runs_ms("unet")) == 4
    assert all(duration > 0 for duration in totals.values())
    parts = sum(totals.values()) - totals["total"]
    assert 0.5 * totals["total"] < parts <= totals["total"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ()}, "prompt is an empty list"),
        ({"prompt": 7}, "not text"),
        ({"prompt": ("a", 7)}, "not text"),
        ({"prompt": "a \udcff"}, "no Unicode text, at character 2"),
        ({"negative_prompt": 7}, "not text"),
        ({"prompt": ("a", "b"), "negative_prompt": ("c",)}, "1 negative prompts for 2"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 2.0}, "num_inference_steps is 2.0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": MAX_SEED + 1}, "seed is 18446744073709551616"),
        ({"seed": MAX_SEED, "num_images_per_prompt": 2}, "seed of the last picture"),
        ({"seed": True}, "seed is True"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"eta": -0.1}, "eta is -0.1"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"cache_interval": 0}, "cache_interval is 0"),
        ({"cache_interval": 1.5}, "cache_interval is 1.5"),
        ({"height": 0}, "height is 0"),
        ({"scheduler": 7}, "scheduler is 7"),
        ({"guidance_scale": 1e30}, r"guidance_scale is 1e\+30\n.*from -1000 to 1000"),
        ({"eta": 10**400}, "eta is 10{78}…"),
        ({"seed": 10**5000}, "seed is a number of thousands of digits"),
        ({"cache_interval": 10**5000}, "cache_interval is a number of thousands"),
        ({"prompt": 10**5000}, "thousands of digits, not text"),
        ({"seed": np.bool_(True)}, "seed is .*True"),
        ({"height": np.float32(64)}, "height is 64.0"),
        ({"guess_mode": ""}, "guess_mode is ''"),
        ({"guess_mode": []}, r"guess_mode is \(\)"),
        ({"guess_mode": 0}, "guess_mode is 0"),
        ({"controlnet_conditioning_scale": True}, "controlnet_conditioning_scale is True"),
        ({"control_guidance_end": (1.0, True)}, "control_guidance_end is True"),
    ],
)
def test_requests_that_no_bundle_can_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Request(**{"prompt": "a cat", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "eular"}, "Did you mean 'euler"),
        ({"height": 128}, "64×64 .*not 128×64"),
        ({"width": 512}, "--size 512x64"),
        ({"num_inference_steps": 5000}, "5000|1000"),
        ({"cache_interval": 2}, "sd-export --model .* --feature-cache --output BUNDLE"),
    ],
)
def test_requests_that_this_bundle_cannot_do(
    tiny_model: TinyModel, options: dict[str, Any], message: str
) -> None:
    request = Request("a cat", **options)
    with pytest.raises(ConfigError, match=message):
        tiny_model.pipeline.stream(request)


def test_numbers_of_numpy_are_pythons_own() -> None:
    request = Request(
        "a cat",
        seed=[np.int64(7), np.uint64(MAX_SEED)],
        num_images_per_prompt=np.int8(2),
        guidance_scale=np.float32(7),
        eta=np.float64(0.5),
    )
    assert request == Request(
        "a cat", seed=(7, MAX_SEED), num_images_per_prompt=2, guidance_scale=7.0, eta=0.5
    )
    kinds = [type(number) for number in (*request.seed, request.guidance_scale, request.eta)]
    assert kinds == [int, int, float, float]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mask_image", "mask"),
        ("init_image", "image"),
        ("generator", "seed"),
        ("num_images", "num_images_per_prompt"),
        ("steps", "num_inference_steps"),
    ],
)
def test_options_by_the_names_of_others(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option {name!r}\nHere it is {meant!r}"):
        Request.from_mapping({"prompt": "a", name: 1})


def test_null_in_a_mapping_is_the_default() -> None:
    nothing = dict.fromkeys(field.name for field in fields(Request) if field.init)
    assert Request.from_mapping({**nothing, "prompt": "a"}) == Request("a")
    with pytest.raises(ConfigError, match="no prompt"):
        Request.from_mapping(nothing)


def test_requests_from_mappings() -> None:
    request = Request.from_mapping({"prompt": ["a", "b"], "seed": 3})
    assert request == Request(("a", "b"), seed=3)
    with pytest.raises(ConfigError, match="Did you mean 'seed'"):
        Request.from_mapping({"prompt": "a", "sead": 3})
    with pytest.raises(ConfigError, match="no prompt"):
        Request.from_mapping({"seed": 3})


def altered_bundle(
    model: TinyModel, path: Path, component: str, change: Callable[[str, np.ndarray], np.ndarray]
) -> Path:
    """A sound copy of the model's bundle whose ``component`` has other weights."""
    staging = path.with_name("staging")
    shutil.copytree(model.bundle, staging)
    manifest = open_bundle(model.bundle).manifest
    entry = manifest.components[component]
    graph = onnx.load(staging / entry.file)
    for tensor in graph.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(change(tensor.name, values), tensor.name))
    for file in entry.files:
        (staging / file).unlink()
    onnx.save(graph, staging / entry.file)
    (staging / "bundle.json").unlink()
    entry = replace(entry, files=hash_files(staging, [entry.file]))
    engine = portable_entry(
        component, entry, manifest.profile, "onnxruntime", version="1", target="cpu", precision=None
    )
    engines = [e for e in manifest.engines if e.component != component] + [engine]
    manifest = replace(
        manifest, components={**manifest.components, component: entry}, engines=tuple(engines)
    )
    seal(staging, path, manifest)
    return path


@pytest.mark.parametrize(
    ("component", "value", "message"),
    [
        ("unet", np.nan, "the UNet returned values that are not finite"),
        ("text_encoder", np.nan, "the UNet returned values that are not finite"),
        ("vae_decoder", np.nan, "the VAE decoder returned values that are not finite"),
        ("vae_decoder", 0.0, "a picture of one single colour"),
    ],
)
def test_a_black_picture_is_an_error(
    tiny_model: TinyModel, tmp_path: Path, component: str, value: float, message: str
) -> None:
    path = altered_bundle(
        tiny_model,
        tmp_path / "altered",
        component,
        lambda _, weights: np.full_like(weights, value) if weights.ndim > 1 else weights,
    )
    with Pipeline.load(path, threads=1) as pipeline, pytest.raises(BackendError, match=message):
        pipeline.generate(Request("a cat", seed=1, num_inference_steps=2))


def test_bundles_that_do_not_open(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="sd-export"):
        Pipeline.load(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'onnxruntime'"):
        Pipeline.load(tiny_model.bundle, backend="onnxruntim")
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model.bundle, damaged)
    for name in ("unet/model.onnx_data", "tokenizer/tokenizer.json"):
        path = damaged / name
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
        with pytest.raises(BundleError, match=name):
            Pipeline.load(damaged)
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
    Pipeline.load(damaged, threads=1).close()


def test_each_picture_may_have_a_seed_of_its_own(tiny_model: TinyModel) -> None:
    request = Request("a cat", seed=(11, 3), num_images_per_prompt=2, num_inference_steps=2)
    assert [image.seed for image in request.images()] == [11, 3]
    tiny_model.assert_same(request)
    with pytest.raises(ConfigError, match="2 seeds for 3 pictures"):
        replace(request, num_images_per_prompt=3)
    with pytest.raises(ConfigError, match="seed is -1"):
        replace(request, seed=(0, -1))
