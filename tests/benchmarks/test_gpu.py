"""`make gpu` without a GPU: what it plans, and that one step's failure is told and outlived."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from scripts import load_script
from sd_bench.cli import cli
from sd_export.cli import export_command

if TYPE_CHECKING:
    from types import ModuleType


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The script, which is no part of a package."""
    return load_script("gpu")


def plan(gpu: ModuleType, folder: Path, **changes: Any) -> Any:
    given = {
        **{"folder": folder, "checkpoint": None, "engines": gpu.ENGINES, "precision": "fp16"},
        **{"batch_size": 1, "peers": (), "num_inference_steps": 50, "rounds": 5},
        "captions": 200,
    }
    return gpu.Plan(**given | changes)


@pytest.mark.parametrize(("batch_size", "more"), [(1, set()), (8, {"scaling"})])
def test_every_step_needs_only_what_comes_before(
    gpu: ModuleType, tmp_path: Path, batch_size: int, more: set[str]
) -> None:
    engines = (*gpu.ENGINES, "tensorrt@fp8")
    steps = plan(gpu, tmp_path, engines=engines, batch_size=batch_size).steps()
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    results = [step.result for step in steps if step.result]
    assert len(set(results)) == len(results)
    for index, step in enumerate(steps):
        assert set(step.needs) <= set(names[:index])
    for engine in engines:
        asked = {name.split()[0] for name in names if name.endswith(f" {engine}")}
        assert asked == {"full", "shapes", "latency", "quality", "serve", *more}


def test_every_command_is_one_that_its_program_takes(gpu: ModuleType, tmp_path: Path) -> None:
    """A wrong option would only be found on the machine that is rare."""
    groups = {"sd-bench": cli, "sd-export": export_command}
    parsed = []
    engines = (*gpu.ENGINES, "tensorrt@fp8", "tensorrt-rtx:sm89@fp8")
    asked = plan(
        gpu, tmp_path, engines=engines, batch_size=8, peers=("diffusers-cuda-fp16",)
    ).steps()
    for step in asked:
        program, *arguments = step.command
        group = groups.get(Path(program).name)
        if group is not None:
            context = click.Context(group)
            command = group.get_command(context, arguments[0])
            words = arguments if command is None else arguments[1:]
            (command or group).make_context(step.name, words)
            parsed.append(step.name)
    assert len(parsed) == 2 + 6 * len(engines) + 1


def test_a_precision_is_built_and_measured(gpu: ModuleType, tmp_path: Path) -> None:
    """Calibrated on captions where the checkpoint was taught no other words."""
    steps = {s.name: s for s in plan(gpu, tmp_path, engines=["tensorrt-rtx:sm89@fp8"]).steps()}
    name = "tensorrt-rtx:sm89@fp8"
    for step in (f"{what} {name}" for what in ("quality", "serve", "latency", "full build")):
        command = " ".join(steps[step].command)
        assert "--backend tensorrt-rtx --precision fp8" in command
        assert "captions.txt" not in command
    assert steps[f"latency {name}"].on_gpu
    command = " ".join(steps[f"shapes build {name}"].command)
    assert "--precision fp8 --target sm89 --calibration-prompts" in command
    assert "shapes/captions.txt" in command


def python(gpu: ModuleType, name: str, code: str, **more: Any) -> Any:
    return gpu.Step(name=name, command=(sys.executable, "-c", code), **more)


def test_a_failure_is_told_and_what_does_not_need_it_goes_on(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "figure.json"
    outcomes = gpu.run(
        [
            python(gpu, "broken", "raise SystemExit('no such card')"),
            python(gpu, "after", "print('never')", needs=("broken",)),
            python(gpu, "last", f"open({str(written)!r}, 'w').write('[42]')", result=written),
        ],
        tmp_path,
    )
    assert [(o.exit_code, o.said, o.result) for o in outcomes] == [
        (1, "no such card", None),
        (None, "needs broken", None),
        (0, "", [42]),
    ]
    assert "no such card" in (tmp_path / "broken.log").read_text()
    assert "not run" in capsys.readouterr().out
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["result"] for step in report["steps"]] == [None, None, [42]]
    assert report["environment"]["python"]


def test_what_has_ended_is_kept_whatever_comes(gpu: ModuleType, tmp_path: Path) -> None:
    kept = tmp_path / "gpu.json"
    steps = [
        python(gpu, "first", "print(42)"),
        python(gpu, "second", f"print(open({str(kept)!r}).read())"),
    ]
    _, second = gpu.run(steps, tmp_path)
    assert '"said": "42"' in second.said


def test_when_the_time_is_over_nothing_more_is_run(gpu: ModuleType, tmp_path: Path) -> None:
    steps = [
        python(gpu, "endless", "import time; print('begun', flush=True); time.sleep(600)"),
        python(gpu, "late", "print('never')"),
    ]
    endless, late = gpu.run(steps, tmp_path, minutes=0.02)
    assert endless.exit_code
    assert endless.said.endswith("stopped: the time is over")
    assert (late.exit_code, late.said) == (None, "the 0.02 minutes are over")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["name"] for step in report["steps"]] == ["endless", "late"]


def test_what_is_quick_comes_first(gpu: ModuleType, tmp_path: Path) -> None:
    names = [step.name for step in plan(gpu, tmp_path).steps()]
    full = names.index("checkpoint")
    assert full == 1 + 1 + 3 * len(gpu.ENGINES), "after the tests and all of the shipped checkpoint"


def test_figures_of_the_processor_do_not_pass_for_a_gpus(gpu: ModuleType, tmp_path: Path) -> None:
    figure = tmp_path / "figure.json"
    steps = []
    for name, used in (("fell back", 0), ("ran", 1)):
        code = f"open({str(figure)!r}, 'w').write('{{\"gpu_memory_bytes\": {used}}}')"
        steps.append(python(gpu, name, code, result=figure, on_gpu=True))
    fell_back, ran = gpu.run(steps, tmp_path)
    assert (fell_back.exit_code, ran.exit_code) == (1, 0)
    assert "these are the processor's figures" in fell_back.said
