"""`benchmarks/unet_step.py`: ways take turns on one UNet, and one that fails is told."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from scripts import load_script
from tiny import make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script, which is no part of a package."""
    return load_script("unet_step")


def test_what_can_be_run_is_measured_and_what_fails_is_told(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    output = tmp_path / "figures.json"
    monkeypatch.setattr(script.Bench, "compiled", _refused)  # it takes minutes; as does the next
    monkeypatch.setattr(script.Bench, "ahead_of_time", lambda bench, folder: bench.eager())
    monkeypatch.setattr(script, "PRODUCT_SIZE", {"cpu": 64})
    monkeypatch.setattr(script, "COPY_BYTES", {"cpu": 1 << 16})
    options = ["--device", "cpu", "--dtype", "bfloat16", "--rounds", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["unet_step.py", str(checkpoint), *options])
    script.main()
    report = json.loads(output.read_text("utf-8"))
    eager, compiled, ahead = report["ways"]
    assert [way["name"] for way in report["ways"]] == ["diffusers", "torch.compile", "AOTInductor"]
    assert compiled["failed"] == "RuntimeError: no compiler"
    assert compiled["ms"] == []
    for way in (eager, ahead):
        assert len(way["ms"]) == 3
        assert 1e-4 < way["error"] < 5e-2  # what bfloat16 rounds
    assert set(report["ceilings"]) == {"matmul_flops", "copy_bytes_per_s"}
    assert "failed: RuntimeError: no compiler" in capsys.readouterr().out


def _refused(bench: Any) -> Any:
    raise RuntimeError("no compiler")
