"""`sd-bench scaling`: its lines against scipy's, its turns against drift, and one real run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import linregress

from sd_bench.cli import main
from sd_bench.line import fit_line
from sd_bench.load import Load, measure_peak_memory
from sd_bench.measurement import Settings
from sd_bench.scaling import FORMAT, scaling_axes, turns
from sd_engines.bundle import open_bundle
from sd_engines.errors import BackendError, ConfigError
from sd_engines.seal import seal
from tiny_onnx import PROFILE, UNET_INPUTS, make_bundle, make_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines import Bundle

FIXED = Settings(backend="onnxruntime")


@pytest.mark.parametrize("seed", range(5))
def test_the_line_is_that_of_numpy_and_scipy(seed: int) -> None:
    draw = np.random.default_rng(seed)
    x = draw.uniform(1, 100, size=3 + seed).tolist()
    y = [12 + 3.4 * at + draw.normal(0, 10) for at in x]
    line, oracle = fit_line(x, y), linregress(x, y)
    assert [line.per_unit, line.fixed] == pytest.approx(np.polyfit(x, y, 1))
    assert [line.per_unit, line.fixed] == pytest.approx([oracle.slope, oracle.intercept])
    assert line.per_unit_error == pytest.approx(oracle.stderr)
    assert line.fixed_error == pytest.approx(oracle.intercept_stderr)
    assert line.r_squared == pytest.approx(oracle.rvalue**2)
    missed = [at_y - np.polyval(np.polyfit(x, y, 1), at) for at, at_y in zip(x, y, strict=True)]
    assert line.residual == pytest.approx(np.sqrt(np.mean(np.square(missed))))
    assert line.at(7.0) == pytest.approx(np.polyval(np.polyfit(x, y, 1), 7.0))


def test_lines_that_leave_nothing_to_judge() -> None:
    two = fit_line([1, 3], [10, 30])
    assert (two.fixed, two.per_unit) == pytest.approx((0, 10))
    assert (two.fixed_error, two.per_unit_error, two.r_squared) == (None, None, None)
    flat = fit_line([1, 2, 3], [5, 5, 5])
    assert (flat.fixed, flat.per_unit, flat.residual, flat.r_squared) == (5, 0, 0, None)
    for x in ([], [4], [4, 4]):
        with pytest.raises(ConfigError, match="two different points"):
            fit_line(x, [1.0] * len(x))


def test_turns_keep_steady_drift_out_of_the_line() -> None:
    """The machine slows down by 1 % a sample: in turns the slope is kept, in blocks it is not."""

    def slope(order: list[int]) -> float:
        found: dict[int, list[float]] = {}
        for when, x in enumerate(order):
            found.setdefault(x, []).append(10 + 2 * x + when * 0.2)
        return fit_line(list(found), [median(samples) for samples in found.values()]).per_unit

    loads, runs = [1, 2, 3, 4], 6
    order = [load for turn in turns(loads, runs) for load in turn]
    assert Counter(order) == dict.fromkeys(loads, runs)
    assert slope(order) == pytest.approx(2)
    assert slope(sorted(order)) > 3


def tiny_bundle_of(path: Path, *, height: int) -> Bundle:
    staging = path.with_name(f".{path.name}.staging")
    staging.mkdir()
    manifest = make_manifest(staging)
    (sample, *rest), outputs = UNET_INPUTS, manifest.components["unet"].outputs
    shape = (*sample.shape[:2], height // PROFILE.vae_scale_factor, sample.shape[3])
    specs = {
        "inputs": (replace(sample, shape=shape), *rest),
        "outputs": tuple(replace(spec, shape=("batch", *shape[1:])) for spec in outputs),
    }
    components = {"unet": replace(manifest.components["unet"], **specs)}
    profile = replace(PROFILE, height=height)
    seal(staging, path, replace(manifest, profile=profile, components=components))
    return open_bundle(path)


def test_an_axis_varies_one_number(tmp_path: Path) -> None:
    small = make_bundle(tmp_path / "small")
    large = tiny_bundle_of(tmp_path / "large", height=128)
    axes = scaling_axes(
        [large.path, small.path], FIXED, steps=[20, 5, 5], images=[1], requests=[1, 2]
    )
    base = Load(bundle=str(large.path), settings=FIXED)
    assert {axis.name: dict(axis.loads) for axis in axes} == {
        "steps": {5: replace(base, settings=replace(FIXED, num_inference_steps=5)), 20: base},
        "requests at once": {1: base, 2: replace(base, requests=2)},
        "1000 pixels per picture": {
            64 * 64 / 1000: replace(base, bundle=str(small.path)),
            128 * 64 / 1000: base,
        },
    }
    assert list(axes[0].loads) == [5, 20]
    assert list(axes[2].loads) == [4.096, 8.192]


def test_what_cannot_make_a_line_is_refused(tmp_path: Path, tiny_bundle: Bundle) -> None:
    path = tiny_bundle.path
    with pytest.raises(ConfigError, match="nothing varies"):
        scaling_axes([path], FIXED, steps=[5], images=[1], requests=[1])
    staging, other = tmp_path / "staging", tmp_path / "other"
    staging.mkdir()
    manifest = make_manifest(staging)
    seal(staging, other, replace(manifest, model=replace(manifest.model, source="another")))
    with pytest.raises(ConfigError, match="different checkpoints"):
        scaling_axes([path, other], FIXED, steps=[5, 9], images=[1], requests=[1])


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="there is no such folder"):
        measure_peak_memory(Load(bundle=str(tmp_path / "missing"), settings=FIXED))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "5,x"], "whole numbers"),
        (["--images", "0,1"], "whole numbers"),
        (["--requests", ""], "whole numbers"),
        (["--plot", "figure.bmp"], ".svg"),
        (["--output", "missing/a.json"], "mkdir"),
        (["--output", "a.svg", "--plot", "a.svg"], "two files"),
        (["--num-inference-steps", "0"], "1 or more"),
        (["--backend", "onnxruntim", "--runs", "1"], "Did you mean 'onnxruntime'"),
    ],
)
def test_wrong_requests(
    shapes_bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["scaling", str(shapes_bundle), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_run(shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "1,2,3", "--images", "1", "--requests", "1,2", "--threads", "1"]
    arguments += ["--num-inference-steps", "1", "--scheduler", "ddim", "--backend", "onnxruntime"]
    arguments += ["--runs", "2", "--memory-runs", "1", "--json"]
    arguments += ["--output", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]
    assert main(["scaling", str(shapes_bundle), *arguments]) == 0
    summary = json.loads(capsys.readouterr().out)
    document = json.loads((tmp_path / "a.json").read_text())
    assert {name: document[name] for name in summary} == summary
    assert document["format"] == FORMAT
    assert document["environment"]["python"]
    assert (summary["backend"], summary["precision"]) == ("onnxruntime", "fp32")

    loads = {
        (load["settings"]["num_inference_steps"], load["requests"]): load
        for load in document["loads"]
    }
    assert set(loads) == {(1, 1), (2, 1), (3, 1), (1, 2)}
    for (steps, requests), load in loads.items():
        assert len(load["samples"]) == 2 * requests
        for sample in load["samples"]:
            assert len(sample["unet_steps_ms"]) == steps
    for axis, points in zip(
        summary["axes"], ([(1, 1), (2, 1), (3, 1)], [(1, 1), (1, 2)]), strict=True
    ):
        medians = [
            median(sample["stages_ms"]["total"] for sample in loads[point]["samples"])
            for point in points
        ]
        assert axis["total_ms"] == pytest.approx(medians)
        oracle = linregress(axis["at"], medians)
        assert axis["time_line_ms"]["per_unit"] == pytest.approx(oracle.slope)
        assert axis["time_line_ms"]["fixed"] == pytest.approx(oracle.intercept)
        peaks = [loads[point]["peaks_memory_bytes"][0] for point in points]
        assert axis["peak_memory_bytes"] == peaks
    one, two = summary["axes"][1]["peak_memory_bytes"]
    assert two - one > 28e6, "two pipelines hold the UNet's 28 MB twice"
    totals = [sample["stages_ms"]["total"] for sample in loads[1, 2]["samples"]]
    until_both_are_done = median([max(totals[:2]), max(totals[2:])])
    assert summary["axes"][1]["pictures_per_s"][1] == pytest.approx(2000 / until_both_are_done)
    text = (tmp_path / "a.svg").read_text("utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")  # noqa: S314 - made by this test
