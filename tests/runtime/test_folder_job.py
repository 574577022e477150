"""``sd-run --jobs``: names that last, and no picture lost or made twice by a run that is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pictures import pixels_of, recipe_in
from sd_runtime import Request
from sd_runtime.cli import main
from sd_runtime.files import claimed_folder
from sd_runtime.lora import Lora
from sd_runtime.picture_job import picture_jobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conftest import TinyModel

MAIN = "import sys; from sd_runtime.cli import main; sys.exit(main())"
FAST = ["--num-inference-steps", "2", "--threads", "1", "--backend", "onnxruntime"]
JOBS = """{"prompt": "a cat"}

{"prompt": "a dog", "num_images_per_prompt": 3, "guidance_scale": 2}
{"prompt": "a cat", "seed": 50}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file of jobs."""
    monkeypatch.chdir(tmp_path)
    Path("jobs.jsonl").write_text(JOBS)
    return tmp_path


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """By name: what tells whether a file was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def run(bundle: Path, *arguments: str) -> int:
    return main([str(bundle), "--jobs", "jobs.jsonl", "--output", "out", *FAST, *arguments])


def test_precision_is_asked_of_the_bundle(
    tiny_model: TinyModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_model.bundle, "--precision", "bf16") == 3
    assert "bf16" in capsys.readouterr().err
    assert not any((folder / "out").glob("*.png"))


def test_jobs_become_named_pictures(
    tiny_model: TinyModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_model.bundle, "--json") == 0
    out, err = capsys.readouterr()
    images = json.loads(out)["images"]
    names = [Path(image["file"]).name for image in images]
    assert [name[:9] for name in names] == [
        "000001-0-",
        "000002-0-",
        "000002-1-",
        "000002-2-",
        "000003-0-",
    ]
    assert sorted(names) == sorted(files_in(folder / "out"))
    assert [(image["prompt"], image["seed"]) for image in images] == [
        ("a cat", 0),
        ("a dog", 1),
        ("a dog", 2),
        ("a dog", 3),
        ("a cat", 50),
    ]
    assert all(image["drawn"] for image in images)
    assert err == "Pictures drawn: 5. There already: 0.\n"
    first = Request("a dog", seed=1, num_inference_steps=2, guidance_scale=2)
    pair = tiny_model.pipeline.generate(
        Request(("a dog", "a dog"), seed=1, num_inference_steps=2, guidance_scale=2)
    )
    np.testing.assert_array_equal(pixels_of(folder / "out" / names[1]), pair.pixels[0])
    np.testing.assert_array_equal(pixels_of(folder / "out" / names[2]), pair.pixels[1])
    recipe = recipe_in(folder / "out" / names[1])
    alone = tiny_model.pipeline.generate(first).recipes[0]
    assert recipe.digest == alone.digest
    assert names[1][9:25] == recipe.digest[:16]


def test_resume_draws_what_is_not_there(
    tiny_model: TinyModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out"
    assert run(tiny_model.bundle, "-q") == 0
    before = files_in(out)
    cat, dog, *_, other_cat = sorted(before)
    (out / dog).unlink()
    (out / other_cat).write_bytes((out / other_cat).read_bytes()[:200])
    (out / f".{dog}.0123abcd.tmp").write_bytes(b"half")
    another = (out / cat).read_bytes()
    stranger = sorted(before)[2]
    (out / stranger).write_bytes(another)  # whole, but of another recipe
    capsys.readouterr()
    assert run(tiny_model.bundle, "--resume") == 0
    printed, err = capsys.readouterr()
    assert printed.splitlines() == [f"out/{dog}", f"out/{stranger}", f"out/{other_cat}"]
    assert err == "Pictures drawn: 3. There already: 2.\n"
    after = files_in(out)
    assert sorted(after) == sorted(before)
    assert after[cat] == before[cat]
    assert recipe_in(out / stranger).seed == 2

    Path("jobs.jsonl").write_text(JOBS.replace("a dog", "a horse"))
    assert run(tiny_model.bundle, "--resume", "-q") == 0
    assert len(files_in(out)) == 8, "the line that changed has names of its own"
    assert capsys.readouterr().out.count("out/000002-") == 3
    changed = files_in(out)
    assert run(tiny_model.bundle, "--resume", "-q") == 0
    assert files_in(out) == changed
    assert run(tiny_model.bundle, "-q") == 0
    assert files_in(out)[cat] != changed[cat], "without --resume all is drawn anew"


def test_a_killed_run_goes_on(tiny_model: TinyModel, folder: Path) -> None:
    Path("jobs.jsonl").write_text("".join(f'{{"prompt": "cat {i}"}}\n' for i in range(40)))
    arguments = ["--jobs", "jobs.jsonl", "--output", "out", *FAST, "--resume"]
    command = [sys.executable, "-c", MAIN, str(tiny_model.bundle), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        process.kill()
    out = folder / "out"
    before = {name: file for name, file in files_in(out).items() if name.endswith(".png")}
    assert 5 <= len(before) < 40
    assert run(tiny_model.bundle, "--resume") == 0
    after = files_in(out)
    assert len(after) == 40
    assert {name: after[name] for name in before} == before, "none was made twice"
    prompts = [recipe_in(out / name).prompt for name in after]
    assert sorted(prompts) == sorted(f"cat {i}" for i in range(40))


def test_two_runs_do_not_share_a_folder(
    tiny_model: TinyModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claimed_folder(folder / "out"):
        assert run(tiny_model.bundle) == 2
        assert "another process writes into out" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["a cat", "--jobs", "jobs.jsonl", "-o", "out"], 2, "--jobs stands alone"),
        (["--jobs", "jobs.jsonl", "-o", "out", "--grid"], 2, "--jobs stands alone"),
        (["--jobs", "jobs.jsonl", "-o", "out", "--refiner", "r"], 2, "--jobs stands alone"),
        (["--jobs", "missing.jsonl", "-o", "out"], 2, "cannot read missing.jsonl"),
        (["--jobs", "steps.jsonl", "-o", "out"], 2, "job 2"),
        (["--jobs", "jobs.jsonl", "-o", "jobs.jsonl"], 2, "Choose another --output"),
        (["--jobs", "jobs.jsonl", "-o", "out", "--backend", "openvin"], 2, "Did you mean"),
        (["a cat", "--resume", "-o", "a.png"], 2, "--jobs FILE"),
    ],
)
def test_bad_jobs(
    tiny_model: TinyModel,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    code: int,
    words: str,
) -> None:
    Path("steps.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "scheduler": "eular"}\n')
    before = sorted(folder.iterdir())
    assert main([str(tiny_model.bundle), *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert sorted(folder.iterdir()) == before


def test_a_lora_changes_the_names(tiny_model: TinyModel, tmp_path: Path) -> None:
    manifest = tiny_model.pipeline.bundle.manifest
    (tmp_path / "style.safetensors").write_bytes(b"one")
    names = {
        picture_jobs([Request("a cat", seed=1)], manifest, loras=loras)[0].name
        for loras in ((), *((Lora(tmp_path / "style.safetensors", scale),) for scale in (0.5, 1)))
    }
    assert len(names) == 3
