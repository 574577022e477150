"""`--precision` chooses among the engines of a bundle, in every instrument as in `sd-run`."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from sd_bench.cli import main
from sd_bench.cold_start import sd_run_command
from sd_bench.latency import measure_latency
from sd_bench.measurement import Settings
from sd_engines.bundle import open_bundle, portable_entry
from sd_engines.seal import add_engines

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "words",
    [
        ["latency", "BUNDLE", "--output", "LATENCY.json"],
        ["scaling", "BUNDLE"],
        ["gate", "BUNDLE", "BUNDLE"],
        ["quality", "BUNDLE"],
        ["serve", "BUNDLE"],
    ],
    ids=lambda words: words[0],
)
def test_a_precision_that_a_bundle_lacks(
    shapes_bundle: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"BUNDLE": str(shapes_bundle), "LATENCY.json": str(tmp_path / "latency.json")}
    asked = [places.get(word, word) for word in words]
    assert main([*asked, "--precision", "fp8"]) in (3, 4)  # 4: by a process of its own
    assert "has no fp8 engine of unet" in capsys.readouterr().err


def test_one_that_it_has(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "latency.json"
    options = ["--precision", "fp32", "--num-inference-steps", "1", "--runs", "1", "--warm-up", "0"]
    assert main(["latency", str(shapes_bundle), "--output", str(path), *options]) == 0
    assert json.loads(path.read_text())["settings"]["precision"] == "fp32"


def test_only_engines_of_it_are_tried(
    shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once: before the memory is looked at, to which what is only tried does not belong."""
    bundle = open_bundle(shutil.copytree(shapes_bundle, tmp_path / "bundle"))
    coarse = portable_entry(
        "unet",
        bundle.manifest.components["unet"],
        bundle.manifest.profile,
        "openvino",
        version="2026.4.1",
        target="cpu",
        precision="bf16",
    )
    add_engines(bundle.path, bundle.path, engines=[coarse])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = Settings(num_inference_steps=1, precision="fp32")
    measure_latency(bundle.path, settings, warm_up=0, runs=1)
    assert len(list((tmp_path / "cache/sd-toolkit").glob("auto-*"))) == 1


def test_a_cold_start_is_one_of_it(tmp_path: Path) -> None:
    words = sd_run_command(tmp_path, Settings(precision="int8"), output=tmp_path / "picture.png")
    assert "--precision=int8" in words
