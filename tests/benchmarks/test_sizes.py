"""One of a bundle's sizes is measured as a bundle's own is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from sd_bench.cli import main
from sd_bench.comparison import check_comparable
from sd_bench.gate import gate_by_file, gate_in_turns
from sd_bench.judgement import Criterion
from sd_bench.latency import measure_latency
from sd_bench.load import Load
from sd_bench.measurement import Settings, read_measurement
from sd_bench.scaling import scaling_axes
from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

OWN = Settings(num_inference_steps=1, backend="onnxruntime", threads=1)
WIDE = replace(OWN, height=16, width=24)


def test_latency_is_that_of_the_size(sizes_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "wide.json"
    arguments = ["--height", "16", "--width", "24", "--num-inference-steps", "1", "--threads", "1"]
    arguments += ["--runs", "1", "--warm-up", "0", "--cold-starts", "1", "--output", str(path)]
    assert main(["latency", str(sizes_bundle), "--backend", "onnxruntime", *arguments]) == 0
    wide = read_measurement(path)
    own = measure_latency(sizes_bundle, OWN, warm_up=0, runs=1, ceilings=True)
    assert (wide.settings.height, wide.settings.width) == (16, 24)
    assert wide.profile == {"batch_size": 1, "height": 16, "width": 24}
    assert own.profile == {"batch_size": 1, "height": 8, "width": 8}
    for name in ("unet", "vae_decoder"):
        # Attention grows with the square of the pixels, all else with the pixels: six times here.
        assert wide.work[name]["flops"] >= 5.9 * own.work[name]["flops"]
    assert len(wide.cold_start_ms) == 1
    with pytest.raises(ConfigError, match="other shapes: height 8, now 16; width 8, now 24"):
        check_comparable(own, wide)
    check_comparable(replace(own, settings=replace(OWN, height=8)), own)


def test_a_gate_takes_the_size_of_its_baseline(sizes_bundle: Path) -> None:
    criterion = Criterion(stage="total", allowed_regression=0.1, confidence=0.99)
    base = measure_latency(sizes_bundle, WIDE, warm_up=0, runs=20)
    comparison = gate_by_file(base, sizes_bundle, criterion)
    assert comparison.new.profile == {"batch_size": 1, "height": 16, "width": 24}
    missing = replace(WIDE, width=16)
    with pytest.raises(ConfigError, match="not 16×16"):
        gate_by_file(replace(base, settings=missing), sizes_bundle, criterion)
    with pytest.raises(ConfigError, match="not 16×16"):
        gate_in_turns(sizes_bundle, sizes_bundle, criterion, settings=missing)


def test_sizes_of_one_bundle_are_an_axis(sizes_bundle: Path) -> None:
    alone = {"steps": [1], "images": [1], "requests": [1]}
    (axis,) = scaling_axes([sizes_bundle], OWN, **alone)
    load = Load(bundle=str(sizes_bundle), settings=OWN)
    assert dict(axis.loads) == {
        0.064: load,
        0.192: replace(load, settings=replace(OWN, height=24, width=8)),
        0.384: replace(load, settings=WIDE),
    }
    (axis,) = scaling_axes([sizes_bundle], WIDE, **alone)
    assert axis.loads[0.384] == replace(load, settings=WIDE)


def test_scaling_over_sizes(sizes_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "1", "--images", "1", "--requests", "1", "--num-inference-steps", "1"]
    arguments += ["--backend", "onnxruntime", "--runs", "1", "--memory-runs", "1", "--json"]
    assert main(["scaling", str(sizes_bundle), *arguments]) == 0
    (axis,) = json.loads(capsys.readouterr().out)["axes"]
    assert axis["at"] == [0.064, 0.192, 0.384]


def test_parity_at_a_size(sizes_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--height", "24", "--width", "8", "--scheduler", "ddim", "--json"]
    arguments += ["--num-inference-steps", "2", "--guidance-scale", "1.5"]
    assert main(["parity", str(sizes_bundle), *arguments]) == 0
    worst = json.loads(capsys.readouterr().out)["worst"]
    assert worst["pixels_within_1"] >= 0.999


def test_parity_of_a_bundle_whose_checkpoint_is_elsewhere(
    sizes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(sizes_bundle, moved)
    manifest = json.loads((moved / "bundle.json").read_text())
    manifest["model"]["source"] = "nowhere/in/particular"
    (moved / "bundle.json").write_text(json.dumps(manifest))
    assert main(["parity", str(moved), "--scheduler", "ddim"]) == 2
    assert "--model FOLDER" in capsys.readouterr().err
