"""The format that everything of `sd-bench` reads: nothing is lost, and nothing else is taken."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from sd_bench.measurement import Measurement, Sample, Settings, read_measurement
from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

MEASUREMENT = Measurement(
    bundle="a.bundle",
    fingerprint="ab" * 32,
    backend="openvino",
    precision="bf16",
    settings=Settings(prompt="ein großer roter Kreis", scheduler="ddim", threads=2),
    environment={"cpu": "a", "cores": "2"},
    measured_at="2026-11-20T23:59:00+00:00",
    samples=(
        Sample(0.0, {"unet": 5.0, "png": 1.0, "total": 7.0}, [2.0, 3.0], [0.25, 0.5]),
        Sample(0.1, {"unet": 7.0, "total": 8.0}, [4.0, 3.0]),
    ),
    peak_memory_bytes=1 << 30,
    precisions={"unet": "bf16", "vae_decoder": "fp32"},
    cold_start_ms=(1500.0, 1400.0),
    cold_start_stages_ms=({"process": 100.0}, {"process": 90.0}),
    ceilings={"matmul_bf16_flops": 9e11},
    work={"unet": {"flops": 1e9, "bytes": 1e6, "calls": 2}},
)


def test_a_file_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(MEASUREMENT.to_json(), encoding="utf-8")
    assert read_measurement(path) == MEASUREMENT


def test_a_file_of_before_cold_starts_had_stages_is_read() -> None:
    document = json.loads(MEASUREMENT.to_json())
    for name in ("cold_start_stages_ms", "precisions"):
        del document[name]
    for sample in document["samples"]:
        del sample["scheduler_steps_ms"]
    read = Measurement.from_json(json.dumps(document))
    assert read.cold_start_ms == MEASUREMENT.cold_start_ms
    assert read.cold_start_stages_ms == ()
    assert read.stage_ms("scheduler_step") == []


def test_stages_of_every_sample() -> None:
    assert MEASUREMENT.stage_ms("unet") == [5.0, 7.0]
    assert MEASUREMENT.stage_ms("png") == [1.0], "where a sample has it"
    assert MEASUREMENT.stage_ms("unet_step") == [2.0, 3.0, 4.0, 3.0]
    assert MEASUREMENT.stage_ms("scheduler_step") == [0.25, 0.5]
    assert MEASUREMENT.stage_ms("vae_decoder") == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "sd-bench latency", "format_version": 2}',
        '{"format": "sd-bench latency", "format_version": 1, "samples": 3}',
        MEASUREMENT.to_json().replace('"guidance_scale"', '"guidance"'),
        MEASUREMENT.to_json().replace('"peak_memory_bytes"', '"peak"'),
        "[" * 100_000,
    ],
)
def test_anything_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"b\.json") as refused:
        read_measurement(path)
    assert "sd-bench latency" in refused.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json"):
        read_measurement(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("written", "damaged", "named"),
    [
        ('"total": 8.0', '"total": null', "samples[1].stages_ms.total is None"),
        ('"total": 8.0', '"total": "8.0"', "samples[1].stages_ms.total is '8.0'"),
        ('"total": 8.0', '"total": NaN', "samples[1].stages_ms.total is nan"),
        ('"total": 8.0', f'"total": 1{400 * "0"}', "samples[1].stages_ms.total is 1000"),
        ('"started_s": 0.1', '"started_s": true', "samples[1].started_s is True"),
        ('"threads": 2', '"threads": "2"', "settings.threads is '2'"),
        ('"scheduler": "ddim"', '"scheduler": 3', "settings.scheduler is 3"),
        ('"precision": null', '"precision": "fp7"', "settings.precision is 'fp7'"),
        ('"bundle": "a.bundle"', '"bundle": null', "bundle is None"),
        ('"cpu": "a"', '"cpu": 7', "environment.cpu is 7"),
        ('"profile": {}', '"profile": []', "profile is []"),
        ('"process": 90.0', '"process": []', "cold_start_stages_ms[1].process is []"),
        ('"total": 8.0', '"total": -8.0', "samples[1].stages_ms.total is -8.0"),
        ('"total": 8.0', '"total": 0', "samples[1].stages_ms.total is 0"),
        ('"png": 1.0', '"png": -1.0', "samples[0].stages_ms.png is -1.0"),
        ("2.0,", "-2.0,", "samples[0].unet_steps_ms[0] is -2.0"),
    ],
)
def test_a_field_of_another_kind_is_named(written: str, damaged: str, named: str) -> None:
    text = MEASUREMENT.to_json()
    assert text.count(written) == 1
    with pytest.raises(ConfigError) as refused:
        Measurement.from_json(text.replace(written, damaged))
    assert named in refused.value.message


def test_whole_numbers_stand_for_floats() -> None:
    text = MEASUREMENT.to_json().replace('"total": 8.0', '"total": 8')
    assert Measurement.from_json(text) == MEASUREMENT
