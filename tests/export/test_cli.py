"""``sd-export``: words, exit codes, interrupts and two exports at once."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sd_engines.bundle import open_bundle
from sd_engines.spec import Defaults
from sd_export.cli import main

if TYPE_CHECKING:
    from sd_export import ExportReport

COMMAND = [sys.executable, "-c", "import sys; from sd_export.cli import main; sys.exit(main())"]
NAMED = ["--backend", "onnxruntime"]
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
EXTRA = PROJECT["optional-dependencies"]["export"]


def start(checkpoint: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *NAMED, "--model", str(checkpoint), "--output", str(output), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def wait_for(process: subprocess.Popen[str], component: str, stage: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.split()[:2] == [component, stage]:
            return
    raise AssertionError(f"the process ended before {component} {stage}")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom sd_export.cli import main\nmain(['--help'])\n"
        "heavy = {'torch', 'numpy', 'onnx', 'diffusers', 'transformers', 'huggingface_hub'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--model" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "--model is missing"),
        (["--model", "", "--output", "b"], 2, "--model is missing"),
        (["--model", "./nowhere"], 2, "no such file or folder"),
        (["--model", ".", "--precision", "fp23"], 2, "unknown precision"),
        (["--model", "./nowhere", "--output", "b"], 2, "no such file or folder"),
        (["--model", ".", "--output", "b"], 5, "model_index.json"),
        (["--model", ".", "--output", "b", "--backend", "onnx"], 2, "Did you mean"),
        (["--model", ".", "--output", "b", "--heigth", "8"], 2, "--height"),
        (["--model", ".", "--output", "b", "--prediction-type", "eps"], 2, "Did you mean"),
        (["build", "nowhere", "--backend", "openvino"], 3, "no such folder"),
        (["some/model"], 2, "sd-export --model some/model"),
        (["biuld", "nowhere"], 2, "Did you mean 'build'"),
        (["build", "nowhere"], 2, "no backend"),
        (["--model", "x", "build", "nowhere"], 2, "belongs to sd-export itself: --model"),
        (
            ["--precision", "int8", "--batch-size", "1", "build", "b", "--backend", "openvino"],
            2,
            "before build stands what belongs to sd-export itself: --precision, --batch-size",
        ),
        (["-q", "--vae-tiling", "triton", "b", "c"], 2, "itself: --quiet, --vae-tiling"),
    ],
)
def test_errors_say_what_to_do_and_have_their_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.out == ""
    assert "Traceback" not in shown.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("requirement", EXTRA)
def test_what_an_export_needs_is_said_before_it_begins(
    requirement: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = requirement.partition(">")[0].replace("-", "_")
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["--model", "x", "--output", "b"]) == 4
    said = capsys.readouterr().err
    assert f"the package {package} is not installed" in said
    assert 'pip install "sd-toolkit[export]"' in said


@pytest.mark.parametrize(
    ("backend", "extra"), [("openvino", "cpu"), ("tensorrt", "tensorrt"), ("tensorrt-rtx",) * 2]
)
def test_a_backend_that_is_not_installed_is_said_before_an_export_begins(
    backend: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, backend.replace("-", "_"), None)
    assert main(["--model", "./nowhere", "--output", "b", "--backend", backend]) == 4
    assert f'pip install "sd-toolkit[{extra}]"' in capsys.readouterr().err


def test_a_bundle_already_made_is_shown_as_json(
    report: ExportReport, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(checkpoint), "--output", str(report.path), "--json"]
    arguments += ["--backend", "onnxruntime", "--backend", "openvino"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    made = json.loads(shown.out)
    assert made["was_done"] is True
    assert made["bundle"] == str(report.path)
    assert {row["component"] for row in made["certificate"]} >= {"unet", "end_to_end"}
    assert "CreativeML Open RAIL-M" in shown.err
    assert "pixels_within_1" in shown.err


def test_interrupted_then_taken_up_by_two_at_once(smallest: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    distilled = ["--num-inference-steps", "1", "--guidance-scale", "0"]
    first = start(smallest, output, *distilled)
    wait_for(first, "unet", "save")
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 143
    first.communicate()
    assert [p.name for p in tmp_path.iterdir()] == [".bundle.export"]

    pair = [start(smallest, output, "--json", *distilled) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], results
    made = [json.loads(out) for out, _ in results]
    assert sorted(entry["was_done"] for entry in made) == [False, True]
    stages = {
        (stage["component"], stage["stage"]): stage["state"]
        for entry in made
        if not entry["was_done"]
        for stage in entry["stages"]
    }
    assert stages["text_encoder", "trace"] == "skipped"
    assert stages["vae_decoder", "trace"] == "done"
    waited = [err for _, err in results if "waiting for it" in err]
    assert len(waited) <= 1
    open_bundle(output).verify()
    assert open_bundle(output).manifest.model.defaults == Defaults(1, 0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_interrupted_before_anything_is_done_leaves_nothing(smallest: Path, tmp_path: Path) -> None:
    process = start(smallest, tmp_path / "deep" / "bundle")
    wait_for(process, "checkpoint", "hash")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    _, words = process.communicate()
    assert "Interrupted" in words
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_an_error_and_leaves_nothing(smallest: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: both fail in the middle of a write."""
    process = subprocess.run(
        [*COMMAND, *NAMED, "--model", str(smallest), "--output", str(tmp_path / "bundle")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
        timeout=300,
    )
    assert process.returncode == 5, process.stderr
    assert "cannot be written" in process.stderr
    assert "Make room on the disk" in process.stderr
    assert "Traceback" not in process.stderr
    assert not any(tmp_path.iterdir())
