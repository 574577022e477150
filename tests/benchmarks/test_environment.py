"""The fingerprint of a machine: what others say of it too, and what makes one foreign."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sd_bench.environment import INFORMATIVE, difference, environment

ROOT = Path(__file__).parents[2]
SMI = """#!/bin/sh
case "$1" in *name,driver_version,*) ;; *) exit 9 ;; esac
echo "NVIDIA L4, 575.1, 23034 MiB, 72.00 W, 2040 MHz, 210 MHz, 31"
echo "NVIDIA T4, 575.1, 15360 MiB, 70.00 W, 1590 MHz, 300 MHz, 35"
"""


def test_it_says_what_the_system_says() -> None:
    found = environment()
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    assert found["affinity"] == status["Cpus_allowed_list"]
    assert found["python"].endswith(" " + sys.version.split()[0])
    assert os.uname().release in found["kernel"]
    for package in ("sd-toolkit", "numpy", "pillow", "tokenizers"):
        assert found[package] == importlib.metadata.version(package)
    libc = subprocess.run(["getconf", "GNU_LIBC_VERSION"], capture_output=True, text=True)
    assert libc.returncode != 0 or found["libc"] == libc.stdout.strip()
    assert all(isinstance(value, str) and value for value in found.values())


def test_the_commit_is_that_of_the_checkout() -> None:
    head = ""
    if (ROOT / ".git").exists() and shutil.which("git"):  # no archive, below whatever clone
        command = ["git", "-C", ROOT, "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    assert environment().get("commit", "").removesuffix("+") == head


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_an_archive_has_not_the_commit_of_the_repository_that_it_lies_in(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks/sd_bench", tmp_path / "archive/benchmarks/sd_bench")
    git = ["git", "-C", tmp_path, "-c", "user.name=Me", "-c", "user.email=me@localhost"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], check=True)
    code = "import sd_bench.environment as e; print(e.__file__, e.environment().get('commit'))"
    folder = tmp_path / "archive/benchmarks"
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{folder}/sd_bench/environment.py None\n", done.stderr


def test_a_fingerprint_compares_with_itself() -> None:
    assert difference(environment(), environment()) == {}


def test_threads_that_the_shell_sets_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    base = environment()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("EDITOR", "ed")
    assert difference(base, environment()) == {"env:OMP_NUM_THREADS": ("absent", "3")}


def test_a_gpu_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = environment()
    assert found["gpu"] == "NVIDIA L4; NVIDIA T4"
    assert found["gpu_driver"] == "575.1; 575.1"
    assert found["gpu_clocks"] == "210 MHz; 300 MHz"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert set(difference(found, environment())) == {
        "gpu", "gpu_driver", "gpu_memory", "gpu_power_limit", "gpu_max_clocks"
    }  # fmt: skip


def test_what_is_judged_or_passes_makes_nobody_foreign() -> None:
    base = {"cpu": "a", "openvino": "1", "commit": "c", "sd-toolkit": "1", "cpu_mhz": "2"}
    new = {"cpu": "a", "openvino": "1", "commit": "d+", "sd-toolkit": "2", "load_average": "9"}
    assert difference(base, new) == {}
    assert set(base) - {"cpu", "openvino"} <= INFORMATIVE


def test_another_machine_or_version_is_foreign() -> None:
    base = {"cpu": "a", "openvino": "1", "governor": "performance"}
    assert difference(base, {"cpu": "b", "openvino": "2", "gpu": "x"}) == {
        "cpu": ("a", "b"),
        "openvino": ("1", "2"),
        "governor": ("performance", "absent"),
        "gpu": ("absent", "x"),
    }
