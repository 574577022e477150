"""Turns are taken as A B B A and end when the interval is narrow; then the machine is judged."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from latency_noise import QUIET, Noise, open_sides
from sd_bench.cli import main
from sd_bench.gate import FIRST_LOOK, gate_by_file, gate_in_turns, take_turns
from sd_bench.judgement import Criterion, Judgement, Verdict
from sd_bench.latency import measure_latency
from sd_bench.measurement import Sample, Settings, read_measurement
from sd_engines.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sd_bench.gate import Sides
    from sd_bench.measurement import Measurement

CRITERION = Criterion(allowed_regression=0.025)
GENEROUS = Criterion(allowed_regression=9.0)
SETTINGS = Settings(num_inference_steps=1, scheduler="ddim", backend="onnxruntime", threads=1)


def test_pairs_are_a_b_b_a_and_pair_by_index() -> None:
    asked: list[str] = []

    def sampler(name: str, ms: float) -> Sample:
        asked.append(name)
        return Sample(99.0, {"total": ms}, ())

    @contextmanager
    def opened(order: tuple[int, int]) -> Iterator[Sides]:
        asked.append(f"[{'AB'[order[0]]}{'AB'[order[1]]} ")
        yield (
            lambda: sampler("A", 1.0 + len(asked)),
            lambda: sampler("B", 1.0 + len(asked)),
        )
        asked.append("] ")

    base, new = take_turns(opened, CRITERION, max_pairs=32)
    assert "".join(asked) == 4 * "[AB ABBAABBA] [BA BAABBAAB] "
    assert [round(s.stages_ms["total"]) for s in base[:4]] == [2, 5, 6, 9]
    assert [round(s.stages_ms["total"]) for s in new[:4]] == [3, 4, 7, 8]
    times = [s.started_s for pair in zip(base, new, strict=True) for s in pair]
    assert 0 <= times[0] == min(times)
    assert max(times) < 90, "the samplers' own clocks are replaced by one"


def test_turns_end_when_the_interval_is_narrow() -> None:
    seen: list[tuple[int, Judgement | None]] = []
    for jitter, end in ((0.005, FIRST_LOOK), (0.3, 64)):
        base, new = take_turns(
            open_sides(Noise(jitter), np.random.default_rng(0), slowdown=1.0, count=200),
            CRITERION,
            max_pairs=64,
            on_pair=lambda *told: seen.append(told),
        )
        assert len(base) == len(new) == end
    assert [count for count, _ in seen] == [*range(1, 33), *range(1, 65)]
    looks = [(count, judgement.precise) for count, judgement in seen if judgement is not None]
    assert looks[0] == (32, True)
    assert looks[1:] == [(32, False), (40, False), (48, False), (60, False)]


@pytest.mark.parametrize("pairs", [28, 34])
def test_pairs_that_do_not_fill_processes_are_refused(pairs: int) -> None:
    sides = open_sides(QUIET, np.random.default_rng(0), slowdown=1, count=99)
    with pytest.raises(ConfigError, match=f"{pairs} pairs"):
        take_turns(sides, CRITERION, max_pairs=pairs)
    with pytest.raises(ConfigError, match=f"{pairs} pairs"):  # before a bundle is opened
        gate_in_turns(Path("none"), Path("none"), CRITERION, settings=SETTINGS, max_pairs=pairs)


def test_a_stage_that_is_not_there_is_said_after_one_pair() -> None:
    counts: list[int] = []
    with pytest.raises(ConfigError, match="no stage 'vae_decoder'"):
        take_turns(
            open_sides(QUIET, np.random.default_rng(0), slowdown=1, count=99),
            Criterion(stage="vae_decoder", allowed_regression=0.025),
            on_pair=lambda count, judgement: counts.append(count),
        )
    assert counts == []


def test_two_bundles_take_turns_on_this_machine(shapes_bundle: Path, tmp_path: Path) -> None:
    processes = tmp_path / "processes"
    base_python = tmp_path / "python"
    base_python.write_text(
        f'#!/bin/sh\necho $$ >> {processes}\nexec {shlex.quote(sys.executable)} "$@"\n'
    )
    base_python.chmod(0o755)
    comparison = gate_in_turns(
        shapes_bundle,
        shapes_bundle,
        GENEROUS,
        settings=SETTINGS,
        max_pairs=32,
        base_python=base_python,
    )
    assert len(processes.read_text().split()) == 8, "four pairs a process of the base's own"
    assert comparison.judgement.paired
    assert comparison.judgement.verdict is Verdict.PASS
    assert comparison.base.settings == comparison.new.settings == SETTINGS
    assert len(comparison.base.samples) == len(comparison.new.samples) == 32
    starts = [[s.started_s for s in side.samples] for side in (comparison.base, comparison.new)]
    pairs = np.transpose(starts)
    assert (np.diff(np.sort(pairs).ravel()) > 0).all(), "one pair after the other"
    base_first = (pairs[:, 0] < pairs[:, 1]).reshape(8, 4).tolist()
    assert base_first == 4 * [[True, False, True, False], [False, True, False, True]]


def test_what_a_side_cannot_do_is_said(shapes_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        gate_in_turns(shapes_bundle, shapes_bundle, GENEROUS, settings=Settings(scheduler="nosuch"))
    with pytest.raises(BackendError, match="no_python"):
        gate_in_turns(
            shapes_bundle,
            shapes_bundle,
            GENEROUS,
            settings=SETTINGS,
            base_python=tmp_path / "no_python",
        )


@pytest.fixture(scope="module")
def baseline(shapes_bundle: Path) -> Measurement:
    return measure_latency(shapes_bundle, SETTINGS, warm_up=1, runs=8)


def faster(base: Measurement, factor: float) -> Measurement:
    samples = [
        replace(s, stages_ms={name: ms / factor for name, ms in s.stages_ms.items()})
        for s in base.samples
    ]
    return replace(base, samples=tuple(samples))


def test_a_file_is_judged_by_a_fresh_run(
    shapes_bundle: Path, baseline: Measurement, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[int] = []
    fine = gate_by_file(
        faster(baseline, 0.01), shapes_bundle, CRITERION, runs=8, on_sample=told.append
    )
    assert fine.judgement.verdict is Verdict.PASS
    assert told == list(range(1, 9))

    base, fresh = tmp_path / "base.json", tmp_path / "fresh.json"
    base.write_text(faster(baseline, 100).to_json(), encoding="utf-8")
    arguments = [str(base), str(shapes_bundle), "--runs", "8", "--output", str(fresh), "--json"]
    assert main(["gate", *arguments]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "FAIL"
    assert answer["ratio"]["value"] > 2
    assert read_measurement(fresh).settings == SETTINGS


def test_a_foreign_baseline_is_refused_before_anything_is_measured(
    shapes_bundle: Path, baseline: Measurement
) -> None:
    def never(count: int) -> None:
        raise AssertionError("measured")

    foreign = replace(baseline, environment={**baseline.environment, "cpu": "another"})
    with pytest.raises(ConfigError, match="cpu 'another', now"):
        gate_by_file(foreign, shapes_bundle, CRITERION, on_sample=never)
    larger = replace(baseline, profile={**baseline.profile, "width": 512})
    with pytest.raises(ConfigError, match="width 512, now 128"):
        gate_by_file(larger, shapes_bundle, CRITERION, on_sample=never)
    with pytest.raises(ConfigError, match="no stage 'safety_checker'"):
        gate_by_file(
            baseline, shapes_bundle, replace(CRITERION, stage="safety_checker"), on_sample=never
        )
    for count in (0, 7):
        short = replace(baseline, samples=baseline.samples[:count])
        with pytest.raises(ConfigError, match=f"^{count} samples are too few"):
            gate_by_file(short, shapes_bundle, CRITERION, on_sample=never)


def test_options_of_the_other_form_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gate", str(tmp_path), str(tmp_path), "--runs", "9"]) == 2
    assert "--runs" in capsys.readouterr().err
    file = str(tmp_path / "base.json")
    assert main(["gate", file, str(tmp_path), "--num-inference-steps", "9"]) == 2
    assert "--num-inference-steps" in capsys.readouterr().err
    assert main(["gate", file, str(tmp_path), "--max-pairs", "48"]) == 2
    assert "--max-pairs" in capsys.readouterr().err
    assert main(["gate", file, str(tmp_path)]) == 2
    assert "sd-bench latency" in capsys.readouterr().err
