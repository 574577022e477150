"""Percentiles, shares and the table: arithmetic, on samples that were made up."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest

from sd_bench.measurement import Measurement, Sample, Settings
from sd_bench.summary import Latency, achieved, latencies, report, table, throughput

MEASUREMENT = Measurement(
    bundle="a.bundle",
    fingerprint="ab" * 32,
    backend="openvino",
    precision="bf16",
    settings=Settings(num_images=2, num_inference_steps=2),
    environment={},
    measured_at="2026-11-20T23:59:00+00:00",
    samples=tuple(
        Sample(
            started_s=float(index),
            stages_ms={"text_encoder": 4.0, "unet": 20.0, "vae_decoder": 10.0, "total": total},
            unet_steps_ms=[4.0, 6.0, 5.0, 5.0],
        )
        for index, total in enumerate((35.0, 36.0, 49.0))
    ),
    peak_memory_bytes=3 << 20,
    precisions={"text_encoder": "bf16", "unet": "bf16", "vae_decoder": "fp32"},
    cold_start_ms=(900.0, 1100.0),
    cold_start_stages_ms=({"process": 100.0, "load": 800.0}, {"process": 300.0, "load": 800.0}),
    ceilings={"matmul_bf16_flops": 8e11, "matmul_fp32_flops": 4e11, "copy_bytes_per_s": 2e10},
    work={
        "unet": {"flops": 2e9, "bytes": 5e6, "calls": 4},
        "vae_decoder": {"flops": 1e9, "bytes": 1e6, "calls": 2},
    },
)


def test_percentiles_are_those_of_the_standard_library() -> None:
    durations = np.random.default_rng(0).gamma(3, size=57).tolist()
    found = Latency.of(durations)
    cuts = statistics.quantiles(durations, n=100, method="inclusive")
    assert found.runs == 57
    assert (found.min, found.max) == (min(durations), max(durations))
    assert found.mean == pytest.approx(statistics.fmean(durations))
    assert found.median == pytest.approx(statistics.median(durations))
    assert (found.p90, found.p99) == pytest.approx((cuts[89], cuts[98]))


def test_stages_come_in_the_order_of_a_request() -> None:
    found = latencies(MEASUREMENT)
    assert list(found) == ["text_encoder", "unet", "unet_step", "vae_decoder", "rest", "total"]
    assert found["unet_step"].runs == 12
    assert found["unet_step"].max == 6.0
    assert found["rest"].max == pytest.approx(49 - 34)
    both = {"text_encoder": 1.0, "unet": 2.0, "png": 1.0, "text_encoder_2": 1.0, "total": 5.0}
    xl = replace(MEASUREMENT, samples=(Sample(0.0, both, [2.0]),))
    names = ["text_encoder", "text_encoder_2", "unet", "unet_step", "png", "rest", "total"]
    assert list(latencies(xl)) == names


def test_shares_of_the_ceilings() -> None:
    found = achieved(MEASUREMENT)
    assert found["unet"].call_ms == pytest.approx(5)
    assert found["unet"].flops_per_s == pytest.approx(2e9 / 5e-3)
    assert found["unet"].share_of_matmul == pytest.approx(0.5)
    assert found["unet"].share_of_copy == pytest.approx(1e9 / 2e10)
    assert found["vae_decoder"].share_of_matmul == pytest.approx(0.5), "of its own precision's"
    nothing = achieved(replace(MEASUREMENT, ceilings={}))["unet"]
    assert (nothing.share_of_matmul, nothing.share_of_copy) == (None, None)


def test_throughput_counts_pictures() -> None:
    assert throughput(MEASUREMENT) == pytest.approx(2 * 3 / 0.120)


def test_the_table_says_the_same_as_the_report() -> None:
    text, figures = table(MEASUREMENT), report(MEASUREMENT)
    block = text[text.index("Latency") : text.index("Throughput")]
    rows = {line.split()[0]: line.split()[1:7] for line in block.strip().splitlines()}
    for stage in ("text_encoder", "unet", "total"):
        latency = figures["latency_ms"][stage]
        names = ("min", "max", "mean", "median", "p90", "p99")
        assert rows[stage] == [f"{latency[name]:.3f}" for name in names]
    assert "Throughput   50 pictures/s" in text
    assert "median = 1000 ms (process 200, load 800)" in text
    assert "Peak memory  3 MiB" in text
    assert figures["cold_start_ms"]["median"] == 1000
    assert figures["unet_steps_median_ms"] == [4.0, 6.0, 5.0, 5.0]


@pytest.mark.parametrize(("copy", "shown"), [({"copy_bytes_per_s": 2e10}, "20.00"), ({}, "–")])
def test_the_table_shows_the_ceilings_below_the_work(copy: dict[str, float], shown: str) -> None:
    matmul = {"matmul_bf16_flops": 8e11, "matmul_fp32_flops": 4e11}
    lines = table(replace(MEASUREMENT, ceilings=matmul | copy)).splitlines()
    cells = [line.split() for line in lines[-4:]]
    assert [row[:2] for row in cells[:2]] == [["unet", "bf16"], ["vae_decoder", "fp32"]]
    assert cells[2:] == [["ceiling", "bf16", "0.800", shown], ["ceiling", "fp32", "0.400", shown]]


def test_the_table_is_aligned() -> None:
    lines = table(MEASUREMENT).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("Latency"))
    block = lines[first : lines.index("", first)]
    ends = {line.rstrip("%").rfind(".") for line in block[1:] if line.endswith("%")}
    assert len(ends) == 1, "the last column's decimal points stand below each other"
    assert len(block) == 1 + 6


def test_the_table_of_a_bare_measurement() -> None:
    bare = replace(MEASUREMENT, ceilings={}, work={}, cold_start_ms=(), cold_start_stages_ms=())
    assert "ceiling" not in table(bare)
    assert "Cold start" not in table(bare)
    assert "–" in table(replace(MEASUREMENT, ceilings={}))
