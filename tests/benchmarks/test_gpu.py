"""`make gpu` without a GPU: what it plans, and the tables of what it found."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
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


def plan(gpu: ModuleType, folder: Path, *, engines: Any = None, **changes: Any) -> Any:
    given = {
        **{"folder": folder, "checkpoint": None, "precision": "fp16", "batch_size": 1},
        **{"peers": (), "num_inference_steps": 50, "rounds": 5, "captions": 200},
    }
    asked = [gpu.Asked.of(words) for words in engines or gpu.ENGINES]
    return gpu.Plan(**given | changes, engines=asked)


@pytest.mark.parametrize(("batch_size", "more"), [(1, set()), (8, {"scaling"})])
def test_every_errand_needs_only_what_comes_before(
    gpu: ModuleType, tmp_path: Path, batch_size: int, more: set[str]
) -> None:
    engines = (*gpu.ENGINES, "tensorrt@fp8")
    errands = plan(gpu, tmp_path, engines=engines, batch_size=batch_size).errands()
    names = [errand.name for errand in errands]
    assert len(set(names)) == len(names)
    results = [errand.result for errand in errands if errand.result]
    assert len(set(results)) == len(results)
    for index, errand in enumerate(errands):
        assert set(errand.needs) <= set(names[:index])
    for engine in engines:
        asked = {name.split()[0] for name in names if name.endswith(f" {engine}")}
        assert asked == {"full", "shapes", "latency", "quality", "serve", *more}


def test_every_command_is_one_that_its_program_takes(gpu: ModuleType, tmp_path: Path) -> None:
    """A wrong option would only be found on the machine that is rare."""
    groups = {"sd-bench": cli, "sd-export": export_command}
    parsed = []
    engines = (*gpu.ENGINES, "tensorrt@fp8", "tensorrt-rtx:sm89@fp8")
    asked = plan(gpu, tmp_path, engines=engines, batch_size=8, peers=("diffusers-cuda-fp16",))
    for errand in asked.errands():
        program, *arguments = errand.command
        group = groups.get(Path(program).name)
        if group is not None:
            context = click.Context(group)
            command = group.get_command(context, arguments[0])
            words = arguments if command is None else arguments[1:]
            (command or group).make_context(errand.name, words)
            parsed.append(errand.name)
    assert len(parsed) == 2 + 6 * len(engines) + 1


def test_a_precision_is_built_and_measured(gpu: ModuleType, tmp_path: Path) -> None:
    """Calibrated on captions where the checkpoint was taught no other words."""
    name = "tensorrt-rtx:sm89@fp8"
    errands = {errand.name: errand for errand in plan(gpu, tmp_path, engines=[name]).errands()}
    for errand in (f"{what} {name}" for what in ("quality", "serve", "latency", "full build")):
        command = " ".join(errands[errand].command)
        assert "--backend tensorrt-rtx --precision fp8" in command
        assert "captions.txt" not in command
    assert errands[f"latency {name}"].on_gpu
    command = " ".join(errands[f"shapes build {name}"].command)
    assert "--precision fp8 --target sm89 --calibration-prompts" in command
    assert "shapes/captions.txt" in command


def test_what_runs_on_a_processor_is_not_asked_for_a_gpu(gpu: ModuleType) -> None:
    on_gpu = {words: gpu.Asked.of(words).on_gpu for words in (*gpu.ENGINES, "onnxruntime")}
    assert on_gpu == {**dict.fromkeys(gpu.ENGINES, True), "onnxruntime": False}


def test_what_is_quick_comes_first(gpu: ModuleType, tmp_path: Path) -> None:
    names = [errand.name.split()[0] for errand in plan(gpu, tmp_path).errands()]
    assert list(dict.fromkeys(names)) == [
        *("tests", "shapes", "quality", "checkpoint", "full", "latency", "peers", "serve")
    ]


def outcome(name: str, result: Any = None, *, exit_code: int | None = 0, said: str = "") -> Any:
    errands = load_script("errands")
    return errands.Outcome(name=name, command="", exit_code=exit_code, said=said, result=result)


def test_tables_of_what_was_found(shapes_bundle: Path) -> None:
    from sd_bench.latency import measure_latency
    from sd_bench.measurement import Settings
    from sd_bench.summary import achieved

    settings = Settings(backend="onnxruntime", num_inference_steps=2)
    options = {"runs": 2, "warm_up": 0, "cold_starts": 1, "ceilings": True}
    found = measure_latency(shapes_bundle, settings, **options)
    load = {"drawn": 20, "wrong": 0, "failed": 1}
    peer = {"name": "diffusers", "precision": "fp16", "state": "measured", "warm_ms": [30, 31, 40]}
    peer |= {"ratio": {"median": 2.31}, "likeness_to_ours": {"pixels_within_1": 1.0}}
    absent = {"name": "optimum", "precision": "fp16", "state": "failed", "error": "a | b\nno card"}
    text = load_script("gpu_table").tables(
        [
            outcome("full build tensorrt"),
            outcome(
                "full build tensorrt-rtx", exit_code=4, said="…\nError: no Hopper\nBuy another."
            ),
            outcome("latency tensorrt", json.loads(found.to_json())),
            outcome("latency tensorrt-rtx", exit_code=None, said="needs full build tensorrt-rtx"),
            outcome("quality tensorrt", {"obeyed": 0.955, "captions": 200}),
            outcome("serve tensorrt", {"load": load, "overload": load}),
            outcome("peers", {"rows": [peer, absent]}),
        ]
    )
    _, _, ours, refused, _, _, _, *peers = text.splitlines()
    cells = ours.strip("| ").split(" | ")
    assert cells[0] == "tensorrt"
    assert cells[1].split(" / ")[0] == f"{median(found.stage_ms('unet_step')):.2f}"
    assert cells[2] == f"{achieved(found)['unet'].share_of_matmul:.0%}"
    assert 0 < float(cells[4].rstrip("%")) < 100
    assert cells[6] == f"{found.cold_start_ms[0] / 1e3:.2f}"
    assert cells[8:] == ["95.5% of 200", "40, 0, 2"]
    assert set(refused.strip("| ").split(" | ")) == {"tensorrt-rtx", "–"}
    assert "| diffusers | fp16 | 31.0 | 2.31 | 100.00% |" in peers
    assert "| optimum | fp16 | failed | – | no card |" in peers
    assert "| full build tensorrt-rtx | exit 4 | Error: no Hopper |" in peers
    assert "| latency tensorrt-rtx | not run | needs full build tensorrt-rtx |" in peers
