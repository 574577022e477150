"""A cold start is `sd-run` in a process of its own, and its parts make up the whole."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from sd_bench.cold_start import measure_cold_start, sd_run_command
from sd_bench.measurement import Settings
from sd_engines.errors import BackendError
from sd_runtime.cli import run

if TYPE_CHECKING:
    from pathlib import Path


def test_its_parts_make_up_the_whole(shapes_bundle: Path) -> None:
    began = time.perf_counter()
    settings = Settings(num_inference_steps=1, num_images=2, backend="onnxruntime", threads=1)
    cold = measure_cold_start(shapes_bundle, settings)
    around_ms = 1e3 * (time.perf_counter() - began)
    assert list(cold.stages_ms) == ["process", "load", "generate", "png", "other"]
    assert sum(cold.stages_ms.values()) == pytest.approx(cold.first_picture_ms)
    assert all(ms > 0 for ms in cold.stages_ms.values())
    assert cold.first_picture_ms < around_ms


def test_it_fails_in_the_words_of_sd_run(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"ended with 3: Error: .*none\.bundle"):
        measure_cold_start(tmp_path / "none.bundle", Settings())


def test_sd_run_is_asked_for_the_settings(tmp_path: Path) -> None:
    settings = Settings(
        prompt="--a red circle",
        negative_prompt="-blue",
        seed=7,
        num_inference_steps=3,
        guidance_scale=1.5,
        cache_interval=3,
        scheduler="ddim",
        num_images=2,
        backend="openvino",
        threads=1,
    )
    command = sd_run_command(tmp_path / "-b", settings, output=tmp_path / "{index}.png")
    arguments = command[command.index("-c") + 2 :]
    options = run.make_context("sd-run", arguments).params
    assert options["prompt"] == (settings.prompt,)
    assert options["bundle"] == tmp_path / "-b"
    for name in ("negative_prompt", "seed", "num_inference_steps", "guidance_scale"):
        assert options[name] == getattr(settings, name)
    assert (options["cache_interval"], options["scheduler"]) == (3, "ddim")
    assert (options["num_images"], options["backend"], options["threads"]) == (2, "openvino", 1)
