"""``sd-run --ray``: a cluster of one machine, one of whose two workers is killed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pictures import recipe_in
from sd_engines.errors import BackendError, ExportError, SdError
from sd_runtime.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import RayCluster, TinyModel

MAIN = "import sys; from sd_runtime.cli import main; sys.exit(main())"
NUM_JOBS = 40
FAST = ["--num-inference-steps", "10", "--threads", "1", "--backend", "onnxruntime", "--ray"]


def workers_of(pid: int) -> Iterator[int]:
    """The processes below ``pid`` that draw."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
    for child in parents:
        ancestor = child
        while ancestor in parents and ancestor != pid:
            ancestor = parents[ancestor]
        if ancestor == pid and b"MapWorker" in Path(f"/proc/{child}/cmdline").read_bytes():
            yield child


@pytest.mark.slow  # 20 to 80 s on two busy cores, where the suite has ten minutes for all
def test_a_killed_worker_costs_no_picture(
    tiny_model: TinyModel, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    prompts = [f"cat {i}" for i in range(NUM_JOBS)]
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    jobs.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    arguments = ["--jobs", jobs, "--output", out, *FAST, "--workers", "2"]
    command = [sys.executable, "-c", MAIN, tiny_model.bundle, *arguments]
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [*map(str, command)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=ray_cluster.environment,
        ) as process,
    ):
        assert process.stdout is not None
        printed = [process.stdout.readline() for _ in range(4)]
        before = {path: path.stat().st_ino for path in out.glob("0*.png")}
        workers = list(workers_of(ray_cluster.pid))
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        rest = process.stdout.read()  # not `communicate`, which misses what was read ahead
    err = log.read_text("utf-8")
    assert process.returncode == 0, err
    assert len(before) < NUM_JOBS
    assert "Traceback" not in err
    assert f"Pictures drawn: {NUM_JOBS}. There already: 0." in err
    lines = [*"".join(printed).splitlines(), *rest.splitlines()]
    assert sorted(lines) == sorted(map(str, out.iterdir())), "each is named once, no other is left"
    assert {path: path.stat().st_ino for path in before} == before, "none was written twice"
    drawn = [recipe_in(path) for path in out.iterdir()]
    assert sorted(recipe.prompt for recipe in drawn) == sorted(prompts)
    assert sorted(recipe.seed for recipe in drawn) == list(range(NUM_JOBS))


@pytest.mark.parametrize(
    "error",
    [
        BackendError("out of memory", "Use less."),
        ExportError("no graph", "Ask.", component="unet", stage="trace"),
    ],
)
def test_errors_travel(error: SdError) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - just made
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a cat", "--ray"], "--ray without --jobs"),
        (["--jobs", "jobs.jsonl", "--workers", "2"], "--workers without --ray"),
    ],
)
def test_bad_options(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([str(tmp_path), *arguments, "--output", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
