"""Memory on GPUs, as a stand-in for nvidia-smi tells it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from sd_bench.gpu_memory import gpu_memory_bytes, held_on_gpus_bytes
from sd_engines import open_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines import Bundle


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What nvidia-smi says: each GPU's MiB on a line."""
    program, said = tmp_path / "nvidia-smi", tmp_path / "said"
    program.write_text(
        "#!/bin/sh\n"
        '[ "$*" = "--query-gpu=memory.used --format=csv,noheader,nounits" ] || exit 2\n'
        f"cat {said}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return said


def test_all_gpus_together(said: Path) -> None:
    said.write_text("512\n3\n")
    assert held_on_gpus_bytes() == 515 << 20


@pytest.mark.parametrize("words", ["[N/A]\n", ""])
def test_a_gpu_that_does_not_say(said: Path, words: str) -> None:
    said.write_text(words)
    assert held_on_gpus_bytes() == 0


def test_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert held_on_gpus_bytes() == 0


def test_what_engines_hold_is_what_came_since(said: Path, tiny_bundle: Bundle) -> None:
    here = open_bundle(tiny_bundle.path).manifest.engines[0]
    there = replace(here, target="sm90")
    said.write_text("512\n")
    assert gpu_memory_bytes([here, there], before=12 << 20) == 500 << 20
    assert gpu_memory_bytes([here], before=12 << 20) == 0
    assert gpu_memory_bytes([there], before=513 << 20) == 0


def test_a_measurement_tells_it(said: Path, shapes_bundle: Path) -> None:
    from sd_bench.latency import measure_latency
    from sd_bench.measurement import Measurement, Settings
    from sd_bench.summary import report, table

    said.write_text("512\n")
    settings = Settings(backend="onnxruntime", num_inference_steps=1)
    options = {"runs": 1, "warm_up": 0, "cold_starts": 0, "ceilings": False}
    found = measure_latency(shapes_bundle, settings, **options)
    assert found.gpu_memory_bytes == 0  # all of it is somebody else's
    assert "GPU memory" not in table(found)
    found = replace(found, gpu_memory_bytes=3 << 20)
    assert Measurement.from_json(found.to_json()) == found
    assert report(found)["gpu_memory_bytes"] == 3 << 20
    assert "GPU memory   3 MiB" in table(found)
