"""``sd-run`` as its users meet it: files, words, exit codes, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from pictures import pixels_of, recipe_in
from sd_engines.bundle import open_bundle, portable_entry
from sd_engines.seal import seal
from sd_runtime import Request
from sd_runtime.cli import main
from sd_runtime.result import Result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conftest import TinyModel

MAIN = "import sys; from sd_runtime.cli import main; sys.exit(main())"
FAST = ["--num-inference-steps", "2", "--threads", "1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_prompt_becomes_a_picture(
    tiny_model: TinyModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_model.bundle), "a cat", "--output", "cat.png", "--seed", "7", *FAST]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == "cat.png\n"
    assert err == ""
    assert names(folder) == ["cat.png"]
    request = Request("a cat", seed=7, num_inference_steps=2)
    expected = tiny_model.pipeline.generate(request).pixels[0]
    np.testing.assert_array_equal(pixels_of(folder / "cat.png"), expected)


def test_every_option_reaches_the_picture(
    tiny_model: TinyModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(tiny_model.bundle), "a cat", "a dog", "-o", "{index}-{seed}.webp", "--seed", "3",
        "--num-images", "2", "--negative-prompt", "red", "--num-inference-steps", "3",
        "--guidance-scale", "4", "--scheduler", "ddim", "--eta", "0.5", "--height", "64",
        "--width", "64", "--backend", "onnxruntime", "--threads", "1",
        "--save-latents", "latents.npy", "--json",
    ]  # fmt: skip
    began = time.perf_counter()
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    result = tiny_model.pipeline.generate(
        Request(
            ("a cat", "a dog"),
            negative_prompt="red",
            seed=3,
            num_images_per_prompt=2,
            num_inference_steps=3,
            guidance_scale=4.0,
            scheduler="ddim",
            eta=0.5,
        )
    )
    assert [image["file"] for image in report["images"]] == [f"{i}-{3 + i}.webp" for i in range(4)]
    assert [image["seed"] for image in report["images"]] == [3, 4, 5, 6]
    assert [image["prompt"] for image in report["images"]] == ["a cat"] * 2 + ["a dog"] * 2
    assert [image["nsfw_content_detected"] for image in report["images"]] == [None] * 4
    for index, expected in enumerate(result.pixels):
        np.testing.assert_array_equal(pixels_of(folder / f"{index}-{3 + index}.webp"), expected)
    np.testing.assert_allclose(np.load(folder / "latents.npy"), result.latents, atol=1e-6)
    timings = report["timings_ms"]
    assert len(timings["unet_steps"]) == 6, "two batches of three steps"
    stages = ("load", "tokenize", "text_encoder", "unet", "scheduler", "vae_decoder", "webp")
    assert 0 < sum(timings[stage] for stage in stages) < timings["total"]
    assert timings["load"] < timings["first_picture"] < timings["total"]
    assert timings["unet"] < timings["generate"] < timings["total"] - timings["load"]
    assert began < report["started_s"] < time.perf_counter()


def test_prompts_from_a_file(tiny_model: TinyModel, folder: Path) -> None:
    Path("prompts.txt").write_text("a cat\n\n  a dog  \na horse\n")
    arguments = ["--prompts-file", "prompts.txt", "-o", "out.png", "--seed", "5", *FAST, "-q"]
    assert main([str(tiny_model.bundle), *arguments]) == 0
    recipes = [recipe_in(Path(f"out-{i}.png")) for i in range(3)]
    assert [(recipe.prompt, recipe.seed) for recipe in recipes] == [
        ("a cat", 5),
        ("a dog", 6),
        ("a horse", 7),
    ]


def test_prompts_with_options_of_their_own(tiny_model: TinyModel, folder: Path) -> None:
    Path("prompts.jsonl").write_text(
        '{"prompt": "a cat", "num_inference_steps": 1, "guidance_scale": 1}\n'
        '{"prompt": "a dog", "seed": 50, "scheduler": "euler"}\n'
        '{"prompt": "a horse", "num_images_per_prompt": 2}\n'
    )
    arguments = ["--prompts-file", "prompts.jsonl", "-o", "out.png", "--seed", "5", *FAST]
    assert main([str(tiny_model.bundle), *arguments]) == 0
    recipes = [recipe_in(Path(f"out-{i}.png")) for i in range(4)]
    assert [recipe.seed for recipe in recipes] == [5, 50, 6, 7]
    assert [recipe.num_inference_steps for recipe in recipes] == [1, 2, 2, 2]
    assert recipes[0].guidance_scale == 1
    assert recipes[1].scheduler != recipes[0].scheduler


def test_pictures_are_let_go_once_they_are_written(
    tiny_model: TinyModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompts.txt").write_text("a cat\n" * 10)  # two at a time
    drawn: list[weakref.ref[np.ndarray]] = []
    kept: list[int] = []
    files = Result.files

    def noted(result: Result, index: int, path: Path) -> dict[Path, bytes]:
        kept.append(sum(pixels() is not None for pixels in drawn))
        drawn.append(weakref.ref(result.pixels))
        return files(result, index, path)

    monkeypatch.setattr(Result, "files", noted)
    arguments = ["--prompts-file", "prompts.txt", "-o", "out.png", "--json", *FAST]
    assert main([str(tiny_model.bundle), *arguments]) == 0
    assert kept == [0, 1] * 5


def test_a_grid_and_its_recipe(tiny_model: TinyModel, folder: Path) -> None:
    arguments = [str(tiny_model.bundle), "a cat", "--num-images", "3", "--grid", "--seed", "1"]
    assert main([*arguments, "-o", "grid.png", *FAST]) == 0
    assert names(folder) == ["grid.png"]
    grid = pixels_of(folder / "grid.png")
    assert grid.shape == (128, 128, 3)
    expected = tiny_model.pipeline.generate(
        Request("a cat", seed=1, num_images_per_prompt=3, num_inference_steps=2)
    )
    np.testing.assert_array_equal(grid[:64, 64:], expected.pixels[1])
    again = ["--from-image", "grid.png", "-o", "again.png", "--threads", "1"]
    assert main([str(tiny_model.bundle), *again]) == 0
    difference = grid.astype(int) - pixels_of(folder / "again.png")
    assert np.abs(difference).max() <= 1, "batches of two and of one round differently"


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the engines are opened."""

    def draw(*_: object, **__: object) -> None:
        raise AssertionError("it opened the engines")

    monkeypatch.setattr("sd_runtime.job.Pipeline.load", draw)


@pytest.mark.parametrize("options", [["a", "--num-images", "70", "--grid"], ["a cat " * 6000]])
def test_what_has_no_room_in_its_file_is_not_drawn(
    tiny_model: TinyModel,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    no_engines: None,
    options: list[str],
) -> None:
    assert main([str(tiny_model.bundle), *options, "--output", "a.jpg", *FAST]) == 2
    assert "a.jpg: its recipe is" in capsys.readouterr().err


def test_a_picture_that_is_made_too_large_for_its_format_is_not_drawn(
    upscaler_model: TinyModel,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    no_engines: None,
) -> None:
    Image.new("RGB", (4096, 8)).save("wide.png")
    arguments = [str(upscaler_model.bundle), "a cat", "--image", "wide.png", *FAST]
    assert main([*arguments, "--output", "a.webp"]) == 2
    assert "a.webp: 16384×32 pixels, and it can hold 16383" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_a_picture_drawn_again(
    tiny_model: TinyModel, folder: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    bundle, first, second = str(tiny_model.bundle), f"first{suffix}", f"second{suffix}"
    arguments = [bundle, "a cat 🦊", "-o", first, "--negative-prompt", "é", *FAST]
    assert main(arguments) == 0
    assert capsys.readouterr().err.startswith("Seed ")
    assert main([bundle, "--from-image", first, "-o", second, "--threads", "1"]) == 0
    np.testing.assert_array_equal(pixels_of(folder / first), pixels_of(folder / second))
    assert (folder / first).read_bytes() == (folder / second).read_bytes()


def test_a_recipe_with_changes(tiny_model: TinyModel, folder: Path) -> None:
    bundle = str(tiny_model.bundle)
    assert main([bundle, "a cat", "-o", "a.png", "--seed", "4", *FAST]) == 0
    arguments = ["--from-image", "a.png", "-o", "b.png", "--seed", "9", "--guidance-scale", "2"]
    assert main([bundle, *arguments]) == 0
    recipe = recipe_in(Path("b.png"))
    assert (recipe.prompt, recipe.seed, recipe.guidance_scale) == ("a cat", 9, 2)
    assert recipe.num_inference_steps == 2


@pytest.fixture
def inputs(folder: Path) -> Path:
    """``in.png`` and ``mask.png``, of the tiny bundle's size."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("in.png")
    Image.fromarray((pixels[..., 0] > 128).astype(np.uint8) * 255).save("mask.png")
    return folder


def test_a_picture_from_a_picture_and_again(
    tiny_model: TinyModel, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(tiny_model.bundle)
    arguments = [bundle, "a cat", "--image", "in.png", "--mask", "mask.png", "--strength", "0.5"]
    arguments += ["--num-inference-steps", "4", "--threads", "1", "--seed", "3"]
    assert main([*arguments, "-o", "a.png", "--save-latents", "a.npy", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["timings_ms"]["vae_encoder"] > 0
    request = Request(
        "a cat", image="in.png", mask="mask.png", strength=0.5, seed=3, num_inference_steps=4
    )
    result = tiny_model.pipeline.generate(request)
    np.testing.assert_array_equal(pixels_of(inputs / "a.png"), result.pixels[0])
    np.testing.assert_allclose(np.load(inputs / "a.npy"), result.latents, atol=1e-6)

    again = [bundle, "--from-image", "a.png", "-o", "b.png", "--threads", "1"]
    assert main(again) == 2
    assert "Give it again: --image FILE." in capsys.readouterr().err
    assert main([*again, "--image", "in.png"]) == 2
    assert "Give it again: --mask FILE." in capsys.readouterr().err
    assert main([*again, "--image", "in.png", "--mask", "mask.png"]) == 0
    assert (inputs / "a.png").read_bytes() == (inputs / "b.png").read_bytes()


def test_a_recipe_with_another_picture_warns(
    tiny_model: TinyModel, inputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = str(tiny_model.bundle)
    assert main([bundle, "a cat", "-o", "text.png", "--seed", "4", *FAST]) == 0
    change = ["--from-image", "text.png", "--image", "in.png", "--strength", "0.5"]
    assert main([bundle, *change, "-o", "a.png", "--threads", "1"]) == 0
    assert "made from another" not in caplog.text
    recipe = recipe_in(Path("a.png"))
    assert (recipe.seed, recipe.strength, recipe.mask) == (4, 0.5, None)
    again = ["--from-image", "a.png", "--image", "text.png", "--strength", "1"]
    assert main([bundle, *again, "-o", "b.png", "--threads", "1"]) == 0
    assert "a.png was made from another image than text.png" in caplog.text
    recipe = recipe_in(Path("b.png"))
    assert recipe.strength == 1


def test_pictures_named_in_a_file_of_prompts(tiny_model: TinyModel, inputs: Path) -> None:
    Path("prompts.jsonl").write_text(
        '{"prompt": "a cat", "image": "in.png"}\n'
        '{"prompt": "a dog", "image": "in.png", "mask": "mask.png", "strength": 0.5}\n'
        '{"prompt": "a horse"}\n'
    )
    arguments = ["--prompts-file", "prompts.jsonl", "-o", "out.png", "--seed", "5", *FAST]
    assert main([str(tiny_model.bundle), *arguments]) == 0
    recipes = [recipe_in(Path(f"out-{i}.png")) for i in range(3)]
    assert [recipe.strength for recipe in recipes] == [0.8, 0.5, None]
    assert [recipe.image is None for recipe in recipes] == [False, False, True]

    arguments = [str(tiny_model.bundle), *arguments, "--grid"]
    arguments[arguments.index("out.png")] = "grid.png"
    assert main(arguments) == 0
    again = ["--from-image", "grid.png", "--image", "in.png", "--mask", "mask.png"]
    assert main([str(tiny_model.bundle), *again, "-o", "again.png", "--threads", "1"]) == 0
    assert (inputs / "grid.png").read_bytes() == (inputs / "again.png").read_bytes()


def test_a_recipe_of_another_bundle_warns(
    tiny_model: TinyModel,
    guarded_model: TinyModel,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = [str(tiny_model.bundle), "a cat", "-o", "a.png", "--scheduler", "ddim", *FAST]
    assert main(first) == 0
    sizes = ["--height", "24", "--width", "24"]
    again = [str(guarded_model.bundle), "--from-image", "a.png", "-o", "b.png"]
    assert main(again) == 2, "the other bundle draws another size"
    assert "24×24" in capsys.readouterr().err
    assert main([*again, *sizes]) == 0
    assert "drawn with another bundle" in caplog.text


def test_a_recipe_keeps_its_backend(tiny_model: TinyModel, folder: Path) -> None:
    """Backends round differently: a rerun takes the picture's, whatever is fastest here."""
    pytest.importorskip("openvino", reason="needs the extra sd-toolkit[cpu]")
    bundle = folder.parent / "bundle"
    shutil.copytree(tiny_model.bundle, folder.parent / "staging")
    manifest = open_bundle(tiny_model.bundle).manifest
    engines = tuple(
        portable_entry(
            name, entry, manifest.profile, "openvino", version="1", target="cpu", precision="fp32"
        )
        for name, entry in manifest.components.items()
    )
    (folder.parent / "staging" / "bundle.json").unlink()
    seal(folder.parent / "staging", bundle, replace(manifest, engines=manifest.engines + engines))
    arguments = ["a cat", "--seed", "3", *FAST]
    for name in ("onnxruntime", "openvino", "auto"):
        assert main([str(bundle), *arguments, "--backend", name, "-o", f"{name}.png"]) == 0
        assert main([str(bundle), "--from-image", f"{name}.png", "-o", f"{name}2.png"]) == 0
        np.testing.assert_array_equal(
            pixels_of(folder / f"{name}.png"), pixels_of(folder / f"{name}2.png")
        )
    first, again = (
        [
            recipe_in(folder / f"{name}{ending}.png").backend
            for name in ("onnxruntime", "openvino", "auto")
        ]
        for ending in ("", "2")
    )
    assert first[:2] == ["onnxruntime", "openvino"]
    assert again == first
    difference = pixels_of(folder / "onnxruntime.png").astype(int) - pixels_of(
        folder / "openvino.png"
    )
    assert np.abs(difference).max() <= 1


def test_the_safety_checker_is_reported(
    guarded_model: TinyModel,
    suspect: Request,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {
        "--seed": suspect.seed,
        "--num-images": suspect.num_images_per_prompt,
        "--num-inference-steps": suspect.num_inference_steps,
    }
    arguments = [str(suspect.prompt), "-o", "a.png", "--json"]
    arguments += [str(word) for option in options.items() for word in option]
    assert main([str(guarded_model.bundle), *arguments]) == 0
    flags = [i["nsfw_content_detected"] for i in json.loads(capsys.readouterr().out)["images"]]
    assert True in flags
    assert False in flags
    assert caplog.text.count("painted it black") == sum(flags)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["BUNDLE", "-o", "a.png"], 2, "no prompt"),
        (["BUNDLE", "a", "--prompts-file", "empty.txt", "-o", "a.png"], 2, "more than one source"),
        (["BUNDLE", "a"], 2, "--output"),
        (["BUNDLE", "a", "-o", "a.gif"], 2, ".webp"),
        (["BUNDLE", "a", "-o", "missing/a.png"], 2, "mkdir -p missing"),
        (["BUNDLE", "a", "-o", "a.png", "--save-latents", "missing/a.npy"], 2, "mkdir"),
        (["BUNDLE", "a", "-o", "{x}.png"], 2, "{index}"),
        (["BUNDLE", "a", "-o", "a.png", "--save-latents", "./a.png"], 2, "both --output and"),
        (["BUNDLE", "a", "-o", "fifo.png"], 2, "no regular file"),
        (["BUNDLE", "a", "-o", "a.png", "--num-images", "5000000000"], 2, "1 to 100000"),
        (["BUNDLE", "a", "-o", "a.png", "--threads", "1000000000000"], 2, "1 to 1024"),
        (["x" * 300, "-o", "a.png"], 1, "File name too long"),
        (["BUNDLE", "a", "-o", "a.png", "--seeed", "1"], 2, "--seed"),
        (["BUNDLE", "a", "-o", "a.png", "--seed", "x"], 2, "--seed"),
        (["BUNDLE", "a", "-o", "a.png", "--seed", "-1"], 2, "seed is -1"),
        (["BUNDLE", "a", "-o", "a.png", "--seed", str(2**64)], 2, "18446744073709551615"),
        (["BUNDLE", "a", "-o", "a.png", "--num-inference-steps", "0"], 2, "1 or more"),
        (["BUNDLE", "a", "-o", "a.png", "--num-images", "0"], 2, "1 to 100000"),
        (["BUNDLE", "a", "-o", "a.png", "--guidance-scale", "nan"], 2, "finite"),
        (["BUNDLE", "a", "-o", "a.png", "--eta", "2"], 2, "0 to 1"),
        (["BUNDLE", "a", "-o", "a.png", "--image", "missing.png"], 2, "missing.png"),
        (["BUNDLE", "a", "-o", "a.png", "--image", "empty.txt"], 2, "Name a picture file"),
        (["BUNDLE", "a", "-o", "a.png", "--mask", "white.png"], 2, "--image PICTURE"),
        (["BUNDLE", "a", "-o", "a.png", "--strength", "0.5"], 2, "--image PICTURE"),
        (["BUNDLE", "a", "-o", "a.png", "--image", "white.png", "--strength", "2"], 2, "0 to 1"),
        (["BUNDLE", "a", "-o", "a.png", "--image", "white.png", "--strength", "0"], 2, "none"),
        (["BUNDLE", "--prompts-file", "lost.jsonl", "-o", "a.png"], 2, "line 1: cannot read the"),
        (["BUNDLE", "a", "-o", "a.png", "--scheduler", "eular"], 2, "Did you mean 'euler"),
        (["BUNDLE", "a", "-o", "a.png", "--backend", "openvin"], 2, "Did you mean 'openvino'"),
        (["BUNDLE", "a", "-o", "a.png", "--backend", "tensorrt"], 3, "sd-export build"),
        (["BUNDLE", "a", "-o", "a.png", "--threads", "0"], 2, "--threads"),
        (["BUNDLE", "a", "-o", "a.png", "--height", "512"], 2, "sd-export --model"),
        (["BUNDLE", "a", "-o", "a.png", "--width", "-8"], 2, "width is -8"),
        (["missing", "a", "-o", "a.png"], 3, "sd-export"),
        ([".", "a", "-o", "a.png"], 3, "bundle.json"),
        (["BUNDLE", "--from-image", "empty.txt", "-o", "a.png"], 2, "cannot read the picture"),
        (["BUNDLE", "--from-image", "missing.png", "-o", "a.png"], 2, "cannot read the picture"),
        (["BUNDLE", "--prompts-file", "missing.txt", "-o", "a.png"], 2, "cannot read missing.txt"),
        (["BUNDLE", "--prompts-file", ".", "-o", "a.png"], 2, "cannot read"),
        (["BUNDLE", "--prompts-file", "empty.txt", "-o", "a.png"], 2, "holds no prompts"),
        (["BUNDLE", "--prompts-file", "binary.txt", "-o", "a.png"], 2, "not UTF-8"),
        (
            ["BUNDLE", "--prompts-file", "broken.jsonl", "-o", "a.png"],
            2,
            "line 2: Expecting value, at column 11",
        ),
        (["BUNDLE", "--prompts-file", "wrong.jsonl", "-o", "a.png"], 2, "Did you mean 'seed'"),
    ],
)
def test_bad_input(
    tiny_model: TinyModel,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    code: int,
    words: str,
) -> None:
    (folder / "empty.txt").write_text("\n \n")
    (folder / "lost.jsonl").write_text('{"prompt": "a", "image": "lost.png"}\n')
    Image.new("RGB", (64, 64), "white").save(folder / "white.png")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    os.mkfifo(folder / "fifo.png")
    (folder / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (folder / "wrong.jsonl").write_text('{"prompt": "a", "sead": 1}\n')
    before = names(folder)
    bundle = str(tiny_model.bundle)
    assert main([bundle if a == "BUNDLE" else a for a in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert names(folder) == before


def test_a_changed_byte_is_named(
    tiny_model: TinyModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = folder.parent / "bundle"
    shutil.copytree(tiny_model.bundle, bundle)
    path = bundle / "vae_decoder" / "model.onnx_data"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert main([str(bundle), "a cat", "-o", "a.png", *FAST]) == 3
    assert "vae_decoder/model.onnx_data" in capsys.readouterr().err
    assert names(folder) == []


def test_a_scheduler_that_nothing_can_be_drawn_with_is_the_bundles_fault(
    tiny_model: TinyModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = folder.parent / "bundle"
    shutil.copytree(tiny_model.bundle, bundle)
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    manifest["model"]["scheduler"]["beta_schedule"] = "x"
    (bundle / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert main([str(bundle), "a cat", "-o", "a.png", *FAST]) == 3
    assert "bundle.json: model.scheduler: beta_schedule 'x'" in capsys.readouterr().err
    assert names(folder) == []


def start(bundle: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, str(bundle), "a cat", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("seconds", [0.05, 0.4, 1.0], ids=["importing", "loading", "drawing"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing(
    tiny_model: TinyModel, folder: Path, number: signal.Signals, code: int, seconds: float
) -> None:
    arguments = ["-o", "a.png", "--num-inference-steps", "500", "--num-images", "50"]
    with start(tiny_model.bundle, *arguments) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Seed ")
        time.sleep(seconds)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    assert names(folder) == []


def test_a_full_disk_behind_stdout(tiny_model: TinyModel, folder: Path) -> None:
    command = [sys.executable, "-c", MAIN, str(tiny_model.bundle), "a cat", "-o", "a.png", *FAST]
    environment = {k: value for k, value in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_lines_end_where_json_lines_end(tiny_model: TinyModel, folder: Path) -> None:
    prompt = "a\u2028b\x85c"
    Path("one.jsonl").write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\r\n")
    arguments = ["--prompts-file", "one.jsonl", "-o", "a.png", "--seed", "1", *FAST]
    assert main([str(tiny_model.bundle), *arguments]) == 0
    recipe = recipe_in(Path("a.png"))
    assert recipe.prompt == prompt


HEAVY = "torch diffusers transformers onnx onnxruntime openvino PIL tokenizers"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import sd_runtime", HEAVY),
        ("from sd_runtime.cli import main; main(['--help'])", HEAVY + " numpy"),
        ("from sd_runtime import Pipeline, Request", "torch diffusers transformers onnx PIL"),
    ],
)
def test_light_imports(code: str, absent: str) -> None:
    check = f"import sys; {code}; print([m for m in {absent.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_drawing_imports_no_training_stack(tiny_model: TinyModel, folder: Path) -> None:
    check = (
        "import sys; from sd_runtime.cli import main; "
        "code = main(sys.argv[1:]); "
        "print(code, [m for m in ('torch', 'diffusers', 'transformers', 'onnx', 'huggingface_hub') "
        "if m in sys.modules])"
    )
    arguments = [str(tiny_model.bundle), "a cat", "-o", "a.png", "-q", *FAST]
    done = subprocess.run(
        [sys.executable, "-c", check, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout == "a.png\n0 []\n"
    assert done.stderr == ""
