"""The other end of the pipe: what it answers, and that errors arrive as words."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from sd_bench.measurement import Measurement, Settings
from sd_bench.sampler_process import SamplerProcess, serve
from sd_engines.errors import BackendError

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = Settings(num_inference_steps=1, scheduler="ddim", backend="onnxruntime", threads=1)


def answers(*questions: dict[str, Any]) -> list[dict[str, Any]]:
    said = io.StringIO()
    serve(io.StringIO("".join(json.dumps(question) + "\n" for question in questions)), said)
    return [json.loads(line) for line in said.getvalue().splitlines()]


def test_it_opens_samples_and_says_what_it_measured(shapes_bundle: Path) -> None:
    order = {"bundle": str(shapes_bundle), "settings": asdict(SETTINGS), "warm_up": 0}
    opened, sampled, measured = answers(order, {"ask": "sample"}, {"ask": "measurement"})
    assert opened == {"ok": True}
    assert len(sampled["sample"]["unet_steps_ms"]) == 1
    assert sampled["sample"]["stages_ms"]["total"] > sampled["sample"]["stages_ms"]["unet"]
    measurement = Measurement.from_json(measured["measurement"])
    assert measurement.settings == SETTINGS
    assert measurement.backend == "onnxruntime"
    assert measurement.samples == ()


def test_errors_arrive_as_words(tmp_path: Path) -> None:
    order = {"bundle": str(tmp_path / "none"), "settings": asdict(SETTINGS), "warm_up": 0}
    (refused,) = answers(order)
    assert refused["ok"] is False
    assert "none" in refused["error"]
    options = {"warm_up": 0, "log": tmp_path / "log"}
    with pytest.raises(BackendError, match="none") as error:
        SamplerProcess(tmp_path / "none", SETTINGS, python=sys.executable, **options)
    assert "sd-bench latency" in error.value.hint
    with pytest.raises(BackendError, match="exit code 1"):
        SamplerProcess(tmp_path, SETTINGS, python=str(shutil.which("false")), **options)


def test_another_interpreter_imports_its_own_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "imports from <$PYTHONPATH>" >&2\nexit 1\n', "utf-8")
    python.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", "this/checkout")
    with pytest.raises(BackendError, match="imports from <>"):
        SamplerProcess(tmp_path, SETTINGS, python=python, warm_up=0, log=tmp_path / "log")
