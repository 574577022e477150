"""The words, the JSON, the action's format, and the exit codes that scripts act on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from latency_noise import Noise, measurement
from sd_bench.cli import main
from sd_bench.comparison import compare
from sd_bench.comparison_report import github_benchmarks, headline, report, table
from sd_bench.judgement import Criterion

if TYPE_CHECKING:
    from pathlib import Path

    from sd_bench.measurement import Measurement

CRITERION = Criterion(allowed_regression=0.05)
WILD = Noise(jitter=0.5)


def files(folder: Path, base: Measurement, new: Measurement) -> list[str]:
    paths = [folder / "base.json", folder / "new.json"]
    for path, side in zip(paths, (base, new), strict=True):
        path.write_text(side.to_json(), encoding="utf-8")
    return [str(path) for path in paths]


def test_words_say_what_was_judged_and_of_what() -> None:
    base = measurement()
    slower = compare(base, measurement(slowdown=1.1), CRITERION)
    assert headline(slower).startswith("FAIL: total +10.0 % (+")
    assert headline(slower).endswith(", +5.0 % allowed")
    lines = table(slower).splitlines()
    assert lines[0] == headline(slower)
    row = next(line for line in lines if line.startswith("tokenize"))
    assert row.split() == ["tokenize", "0.100", "0.100", "+0.0", "%", "+0.0", "to", "+0.0", "%"]
    assert "40 samples, then 40 in another run" in table(slower)
    assert "20 steps of the checkpoint's own scheduler, guidance 7.5, 1 picture;" in table(slower)
    paired = table(compare(base, base, CRITERION, paired=True))
    assert "40 pairs, taken in turns" in paired
    assert "Note" not in paired


def test_json_holds_every_figure() -> None:
    comparison = compare(measurement(), measurement(slowdown=0.9), CRITERION)
    found = json.loads(json.dumps(report(comparison)))
    assert found["verdict"] == "PASS"
    assert found["stages"]["total"]["ratio"] == found["ratio"]
    assert found["ratio"]["low"] < found["ratio"]["value"] < found["ratio"]["high"] < 1
    assert found["base"]["samples"] == 40
    assert found["allowed_regression"] == 0.05
    assert found["settings"]["num_inference_steps"] == 20


def test_the_action_gets_its_own_format() -> None:
    new = measurement(slowdown=1.1)
    comparison = compare(measurement(), new, CRITERION)
    entries = github_benchmarks(comparison)
    assert [entry["name"] for entry in entries] == [
        f"shapes.bundle openvino fp32: {stage}" for stage in comparison.stages
    ]
    total = entries[-1]
    assert set(total) == {"name", "unit", "value", "range", "extra"}
    assert total["unit"] == "ms"
    assert total["value"] == pytest.approx(np.median(new.stage_ms("total")))
    low, high = np.percentile(new.stage_ms("total"), [25, 75])
    assert total["range"] == f"± {(high - low) / 2:.3g}"
    assert total["extra"].startswith("FAIL: total")
    assert "FAIL" not in entries[0]["extra"]


def test_the_exit_code_is_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = measurement()
    assert main(["compare", *files(tmp_path, base, measurement(seed=1))]) == 0
    assert capsys.readouterr().out.startswith("PASS: total")
    slower = files(tmp_path, base, measurement(slowdown=1.1, seed=1))
    assert main(["compare", *slower]) == 1
    assert capsys.readouterr().out.startswith("FAIL: total")
    assert main(["compare", *slower, "--stage", "png"]) == 0
    assert main(["compare", *slower, "--allowed-regression", "15"]) == 0
    for confidence in ("50", "99.9"):  # the ends of what it takes
        assert main(["compare", *slower, "--confidence", confidence]) == 1
    capsys.readouterr()
    unclear = files(tmp_path, measurement(WILD), measurement(WILD, seed=1))
    assert main(["compare", *unclear]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("INCONCLUSIVE: total")
    assert "Warning" in captured.err
    assert main(["compare", *unclear, "--strict"]) == 1


def test_what_does_not_compare_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = measurement()
    foreign = replace(base, environment={**base.environment, "openvino": "1.0"})
    assert main(["compare", *files(tmp_path, base, foreign)]) == 2
    assert "openvino 'absent', now '1.0'" in capsys.readouterr().err
    same = files(tmp_path, base, base)
    assert main(["compare", *same, "--stage", "unet_stepp"]) == 2
    assert "Did you mean 'unet_step'?" in capsys.readouterr().err
    assert main(["compare", *same, "--html", str(tmp_path / "missing" / "x.html")]) == 2
    twice = ["--html", str(tmp_path / "x"), "--github", str(tmp_path / "x")]
    assert main(["compare", *same, *twice]) == 2
    assert not (tmp_path / "x").exists()


def test_files_are_written_beside_one_json_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    github, html = tmp_path / "github.json", tmp_path / "report.html"
    options = ["--github", str(github), "--html", str(html), "--json"]
    assert main(["compare", *files(tmp_path, measurement(), measurement()), *options]) == 0
    assert json.loads(capsys.readouterr().out)["ratio"]["value"] == 1.0
    entries = json.loads(github.read_text("utf-8"))
    assert entries[-1]["name"].endswith(": total")
    assert html.read_text("utf-8").startswith("<!DOCTYPE html>")
