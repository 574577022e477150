"""Samples are whole requests, and the command writes what it saw."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sd_bench.cli import main
from sd_bench.latency import Sampler, measure_latency, measurement_of
from sd_bench.measurement import Settings, read_measurement
from sd_engines.errors import ConfigError
from sd_runtime import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sd_bench.measurement import Sample

SETTINGS = Settings(num_inference_steps=3, scheduler="ddim", backend="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def pipeline(shapes_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(shapes_bundle, backend="onnxruntime", threads=1) as pipeline:
        yield pipeline


def test_a_sample_is_a_whole_request(pipeline: Pipeline) -> None:
    sampler = Sampler(pipeline, SETTINGS)
    samples = [sampler.sample() for _ in range(2)]
    for sample in samples:
        assert set(sample.stages_ms) == {
            "tokenize", "text_encoder", "noise", "model_input", "unet", "scheduler", "vae_decoder",
            "png", "total",
        }  # fmt: skip
        assert len(sample.unet_steps_ms) == len(sample.scheduler_steps_ms) == 3
        assert sum(sample.unet_steps_ms) == pytest.approx(sample.stages_ms["unet"])
        parts = sum(sample.stages_ms.values()) - sample.stages_ms["total"]
        assert 0 < parts <= sample.stages_ms["total"]
    assert len(sampler.timings.spans["text_encoder"]) == 2, "nothing is remembered between samples"
    assert samples[0].started_s == 0
    assert samples[1].started_s >= samples[0].stages_ms["total"] / 1e3


def test_time_starts_after_the_warm_up(pipeline: Pipeline) -> None:
    sampler = Sampler(pipeline, SETTINGS)
    sampler.warm_up(2)
    assert sampler.sample().started_s == 0


def test_two_samplers_take_turns(pipeline: Pipeline) -> None:
    short = Sampler(pipeline, SETTINGS)
    long = Sampler(pipeline, Settings(num_inference_steps=4, scheduler="ddim", num_images=2))
    samples = [sampler.sample() for sampler in (short, long, long, short)]
    assert [len(sample.unet_steps_ms) for sample in samples] == [3, 8, 8, 3]
    measurement = measurement_of(long, samples[1:3])
    assert measurement.settings.num_images == 2
    assert (measurement.backend, measurement.precision) == ("onnxruntime", "fp32")
    assert measurement.fingerprint == pipeline.fingerprint


def test_runs_and_duration_are_both_at_least(shapes_bundle: Path) -> None:
    seen: list[Sample] = []
    measurement = measure_latency(
        shapes_bundle,
        SETTINGS,
        warm_up=1,
        runs=3,
        on_sample=lambda sampler, sample: seen.append(sample),
    )
    assert measurement.samples == tuple(seen)
    assert len(seen) == 3
    assert measurement.ceilings == measurement.work == {}
    longer = measure_latency(shapes_bundle, SETTINGS, warm_up=0, runs=1, duration_s=0.5)
    last = longer.samples[-1]
    assert last.started_s < 0.5 <= last.started_s + last.stages_ms["total"] / 1e3 + 0.1


def test_settings_that_nobody_can_measure(shapes_bundle: Path, pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match="runs 0"):
        measure_latency(shapes_bundle, SETTINGS, runs=0)
    with pytest.raises(ConfigError, match="num_inference_steps"):
        Sampler(pipeline, Settings(num_inference_steps=0))


def test_peak_memory_holds_what_was_let_go() -> None:
    code = (
        "from sd_engines.memory import peak_memory_bytes as peak, reset_peak_memory as reset;"
        "before = peak(); held = bytearray(300 << 20); del held; most = peak();"
        "reset(); print(before, most, peak())"
    )
    ballast = bytearray(300 << 20)  # the parent's memory is not the child's
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert len(ballast) == 300 << 20
    before, most, after = map(int, ended.stdout.split())
    assert 8 << 20 < before < 300 << 20
    assert most > 300 << 20
    assert 8 << 20 < after < 300 << 20


def test_the_command_writes_what_it_saw(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, trace = tmp_path / "a.json", tmp_path / "trace.json"
    arguments = [
        *("latency", str(shapes_bundle), "--output", str(output), "--trace", str(trace), "--json"),
        *("--num-inference-steps", "2", "--scheduler", "euler", "--backend", "onnxruntime"),
        *("--prompt", "a red circle", "--seed", "3", "--guidance-scale", "1", "--threads", "1"),
        *("--warm-up", "0", "--runs", "2", "--cold-starts", "1"),
    ]
    assert main(arguments) == 0
    figures = json.loads(capsys.readouterr().out)
    measurement = read_measurement(output)
    assert measurement.settings == Settings(
        prompt="a red circle",
        seed=3,
        num_inference_steps=2,
        guidance_scale=1.0,
        scheduler="euler",
        backend="onnxruntime",
        threads=1,
    )
    totals = measurement.stage_ms("total")
    assert len(totals) == figures["latency_ms"]["total"]["runs"] == 2
    assert figures["latency_ms"]["total"]["max"] == max(totals)
    assert len(measurement.cold_start_ms) == 1
    assert min(measurement.ceilings.values()) > 0
    assert {name: work["calls"] for name, work in measurement.work.items()} == {
        "text_encoder": 1, "unet": 2, "vae_decoder": 1
    }  # fmt: skip
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["name"] == "unet" for event in events) == 4
    steps = [event["dur"] / 1e3 for event in events if event["name"] == "unet"]
    assert steps == pytest.approx(measurement.stage_ms("unet_step"))


def test_the_command_checks_before_it_measures(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = str(tmp_path / "none" / "a.json")
    assert main(["latency", str(shapes_bundle), "--output", where]) == 2
    assert "mkdir" in capsys.readouterr().err
    twice = str(tmp_path / "a.json")
    again = str(tmp_path / "none" / ".." / "a.json")
    (tmp_path / "none").mkdir()
    for trace in (twice, again):
        assert main(["latency", str(shapes_bundle), "--output", twice, "--trace", trace]) == 2
        assert "two files" in capsys.readouterr().err
    (tmp_path / "none").rmdir()
    assert list(tmp_path.iterdir()) == []
