"""The library, built once, and a compiler for the programs that use it."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sd_runtime.embed.library import INCLUDE, build_library

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAMS = Path(__file__).parent / "programs"
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")


def _need_command(name: str) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Build ``libsd_runtime.so`` into a new folder, with its headers; where it is."""
    _need_command("cc")
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        pytest.skip("this Python has no shared library")
    return lambda: build_library(tmp_path_factory.mktemp("embed"))


@pytest.fixture(scope="session")
def library(build: Callable[[], Path]) -> Path:
    """``libsd_runtime.so`` as it is built by default."""
    return build()


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Path]:
    """Compile a program with all warnings as errors; where it is."""

    def compiled(source: Path | str, *options: str) -> Path:
        source = PROGRAMS / source
        compiler = ("cc", "-std=gnu11") if source.suffix == ".c" else ("g++", "-std=c++20")
        _need_command(compiler[0])
        program = tmp_path / source.stem
        command = [*compiler, *WARNINGS, f"-I{INCLUDE}", str(source), "-o", str(program), *options]
        subprocess.run(command, check=True)
        return program

    return compiled


@pytest.fixture
def built_example(tmp_path: Path) -> Callable[..., Path]:
    """Build ``example/`` by CMake, against the library in a folder; the folder of its programs."""

    def built_example(folder: Path, *options: str) -> Path:
        _need_command("cmake")
        _need_command("g++")
        built = tmp_path / "build"
        source = INCLUDE.parent / "example"
        configure = ["cmake", "-S", str(source), "-B", str(built), f"-Dsd_runtime_DIR={folder}"]
        subprocess.run([*configure, *options], check=True, capture_output=True)
        subprocess.run(["cmake", "--build", str(built), "-j2"], check=True)
        return built

    return built_example
