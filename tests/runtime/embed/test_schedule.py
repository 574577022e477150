"""`sd-export schedule`, and the table that it prints run in C++."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.bundle import open_bundle
from sd_export.cli import main
from sd_runtime.denoise import denoise
from sd_runtime.noise import NoiseStream
from sd_runtime.schedule import schedule_of
from sd_runtime.table import compile_table
from sd_runtime.timing import Timings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from conftest import TinyModel
    from sd_engines.bundle import Bundle

SHAPE = (1, 4, 8, 8)


class LinearModel:
    """noise_pred = 0.5 · sample + t for the negative half, 0.75 · sample − t for the other."""

    def bind(self, batch: int, *, pictures: int) -> Any:
        shape = (batch, *SHAPE[1:])
        inputs = {
            "sample": np.zeros(shape, np.float32),
            "timestep": np.zeros(batch, np.float32),
            "encoder_hidden_states": np.zeros((batch, 1, 1), np.float32),
        }
        outputs = {"noise_pred": np.zeros(shape, np.float32)}

        def run() -> None:
            sign = inputs["encoder_hidden_states"][:, :, :, None]
            t = inputs["timestep"][:, None, None, None] / np.float32(1000)
            weight = np.float32(0.625) + np.float32(0.125) * sign
            outputs["noise_pred"][...] = weight * inputs["sample"] - sign * t

        return SimpleNamespace(inputs=inputs, outputs=outputs, run=run)


def test_the_loop_in_cpp_is_the_loop_in_python(
    tiny_bundle: Bundle, compiled: Callable[..., Path], tmp_path: Path
) -> None:
    program = compiled("table.cpp")
    for name, settings in (
        ("pndm", {"num_inference_steps": 9, "guidance_scale": 7.5}),
        ("unipc", {"num_inference_steps": 8, "guidance_scale": 3.0, "guidance_stop": 0.6}),
        ("euler_a", {"num_inference_steps": 7, "guidance_scale": 1.0}),
        ("dpm++_2m_sde", {"num_inference_steps": 6, "guidance_scale": 2.0, "guidance_start": 0.2}),
        ("heun", {"num_inference_steps": 5, "guidance_scale": 0.0}),
    ):
        schedule = schedule_of(tiny_bundle.manifest, scheduler=name, **settings)
        (tmp_path / "schedule.json").write_text(json.dumps(schedule))
        steps = int(settings["num_inference_steps"])
        config = {**tiny_bundle.manifest.model.scheduler, "clip_sample": False, "steps_offset": 1}
        table = compile_table(config, scheduler=name, num_inference_steps=steps)
        latents = NoiseStream(1).normal(SHAPE) * np.float32(table.init_noise_scale)
        latents.tofile(tmp_path / "latents")
        stream = NoiseStream(2)
        draws = [stream.normal(SHAPE) for _ in range(int(table.draws_noise.sum()))]
        np.array(draws, np.float32).tofile(tmp_path / "noise")
        rows = denoise(
            LinearModel(),  # type: ignore[arg-type]
            latents,
            prompt_embeds=[np.ones((1, 1), np.float32)],
            negative_prompt_embeds=[-np.ones((1, 1), np.float32)],
            guidance_scale=float(settings["guidance_scale"]),
            guided_rows=range(*schedule["guided_rows"]),
            table=table,
            noise=[NoiseStream(2)],
            timings=Timings(),
        )
        expected = [row.latents.copy() for row in rows][-1]
        files = [tmp_path / file for file in ("schedule.json", "latents", "noise", "drawn")]
        subprocess.run([program, *files], check=True)
        drawn = np.fromfile(tmp_path / "drawn", np.float32).reshape(SHAPE)
        assert np.linalg.norm(drawn - expected) <= 1e-6 * np.linalg.norm(expected), name

    for text in ("", '{"format_version": 2}', json.dumps({**schedule, "alpha": [1.0]})):
        (tmp_path / "schedule.json").write_text(text)
        done = subprocess.run([program, *files], capture_output=True, text=True, check=False)
        assert done.returncode == 2, text
        assert done.stderr


def test_the_command_writes_every_digit(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["schedule", str(tiny_model.bundle), "--scheduler", "euler", "--strength", "0.5"]
    arguments += ["--num-inference-steps", "6"]
    assert main(arguments) == 0
    schedule = json.loads(capsys.readouterr().out)
    output = tmp_path / "schedule.json"
    assert main([*arguments, "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == schedule
    config = open_bundle(tiny_model.bundle).manifest.model.scheduler
    config = {**config, "clip_sample": False, "steps_offset": 1}
    table = compile_table(config, scheduler="euler", num_inference_steps=6, strength=0.5)
    assert (schedule["task"], schedule["scheduler"]) == ("image-to-image", "euler")
    assert schedule["guidance_scale"] == 7.5
    assert schedule["guided_rows"] == [0, 3]
    assert len(schedule["timesteps"]) == 3
    for name in ("timesteps", "pred_sample", "coef_history", "alpha", "noised_sigma"):
        np.testing.assert_array_equal(np.array(schedule[name]), getattr(table, name))
    assert main([*arguments[:2], "--scheduler", "etch"]) == 2
    assert main([*arguments, "--output", str(tmp_path / "no" / "schedule.json")]) == 2


def test_what_is_told_the_guidance(consistency_model: TinyModel) -> None:
    manifest = open_bundle(consistency_model.bundle).manifest
    schedule = schedule_of(manifest, num_inference_steps=4, guidance_scale=8.0)
    width = len(schedule["unet_inputs"]["timestep_cond"])
    assert width == manifest.components["unet"].inputs[-1].shape[-1]
    assert schedule["guided_rows"] == [0, 0]
    assert schedule["draws_noise"][0]
