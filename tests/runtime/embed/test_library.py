"""``libsd_runtime.so`` from C and C++: what it exports, says, draws, and leaves alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd_engines.errors import BackendError, ConfigError
from sd_runtime import Pipeline, Request
from sd_runtime.embed.cli import main
from sd_runtime.embed.library import HEADER, build_library, symbols

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import TinyModel

PROGRAMS = Path(__file__).parent / "programs"
OURS = re.compile(
    r".*(?:libsd_runtime\.so|embed/source|embed/include|/c\+\+/|[/(](?:load|service)\+0x).*"
)
"""A line of a stack in the library or in a program of the example."""


def link(library: Path) -> tuple[str, ...]:
    return f"-L{library.parent}", "-lsd_runtime", f"-Wl,-rpath,{library.parent}", "-pthread"


def write_lora(path: Path) -> Path:
    """A LoRA of kohya's, rank 1, for one layer of ``tiny_model``'s UNet."""
    key = "lora_unet_conv_in"
    down, up = torch.full((1, 4, 3, 3), 0.05), torch.full((32, 1, 1, 1), 0.5)
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, path)
    return path


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_library_exports_the_frozen_symbols(library: Path) -> None:
    listed = run("nm", "-D", "--defined-only", library).stdout.split("\n")
    names = [line.split()[2] for line in listed if line and line.split()[1] != "A"]
    assert sorted(name.partition("@@")[0] for name in names) == symbols()
    assert {name.partition("@@")[2] for name in names} == {"SD_RUNTIME_1"}
    text = HEADER.read_text()
    assert all(f"{name}(" in text for name in symbols())


def test_nothing_but_statuses_crosses_the_boundary(
    library: Path, compiled: Callable[..., Path], tiny_model: TinyModel, tmp_path: Path
) -> None:
    program, pixels = compiled("boundary.c", "-ldl", "-pthread"), tmp_path / "pixels"
    done = run(program, library, tiny_model.bundle, pixels)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    request = Request("a cat", seed=5, num_inference_steps=3, scheduler="ddim", eta=0.5)
    expected = tiny_model.pipeline.generate(request).pixels
    drawn = np.fromfile(pixels, np.uint8).reshape(expected.shape)
    np.testing.assert_array_equal(drawn, expected)


def test_an_environment_may_name_folders_in_any_letters(
    library: Path, compiled: Callable[..., Path], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """As that of an editable install in Jürgen's home, in a program that sets no locale."""
    home = tmp_path / "Jürgen"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    folders = [str(home), *filter(os.path.isdir, sys.path)]
    (packages / "editable.pth").write_text("\n".join(folders), "utf-8")
    program = compiled("opens.c", *link(library))
    done = run(program, tiny_model.bundle, SD_RUNTIME_PYTHON=str(home / "bin" / "python"))
    assert (done.returncode, done.stderr) == (0, "")


HOST = """
import ctypes, sys, threading

library = ctypes.PyDLL(sys.argv[1])  # keeps the interpreter's lock, as extension modules do
library.sd_context_open.restype = ctypes.c_void_p

class Parameters(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("bundle", ctypes.c_char_p),
                ("others", ctypes.c_uint64 * 8)]

def open_nothing():
    parameters = Parameters(ctypes.sizeof(Parameters), b"/nowhere")
    context = ctypes.c_void_p()
    status = library.sd_context_open(ctypes.byref(parameters), ctypes.byref(context))
    codes.append(library.sd_status_code(ctypes.c_void_p(status)))

codes = []
threads = [threading.Thread(target=open_nothing) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(codes)
"""


def test_a_host_in_python_may_keep_its_lock(library: Path) -> None:
    command = [sys.executable, "-c", HOST, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "[3, 3]\n"), done.stderr


def test_jobs_in_cpp_do_not_race(
    build: Callable[[], Path],
    compiled: Callable[..., Path],
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CFLAGS", "-fsanitize=thread")
    dlpack = Path(torch.__file__).parent / "include" / "ATen"
    program = compiled("jobs.cpp", f"-isystem{dlpack}", "-fsanitize=thread", *link(build()))
    png, lora = tmp_path / "drawn.png", write_lora(tmp_path / "löra.safetensors")
    done = run(program, tiny_model.bundle, png, lora, TSAN_OPTIONS="exitcode=0")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    # What was not compiled for it seems to race: what counts is who made the access.
    accesses = re.findall(r"(?:ead|rite) of size .*\n(?: +#.*\(libtsan.*\n)*( +#.*\n)", done.stderr)
    assert not OURS.findall("".join(accesses))
    assert "heap-use-after-free" not in done.stderr

    request = Request(
        "a cat",
        negative_prompt="a dog",
        seed=2**64 - 2,
        num_inference_steps=4,
        guidance_scale=3.5,
        scheduler="ddim",
        num_images_per_prompt=2,
    )
    with Image.open(png) as image:
        assert json.loads(image.info["sd-toolkit"])["recipes"][0]["seed"] == 2**64 - 1
        drawn = np.asarray(image)
    loras = [str(lora), f"{lora}=-0.5"]
    options: dict[str, Any] = {"backend": "onnxruntime", "threads": 1, "loras": loras}
    with Pipeline.load(tiny_model.bundle, **options) as pipeline:
        np.testing.assert_array_equal(drawn, pipeline.generate(request).pixels[1])
    assert (drawn != tiny_model.pipeline.generate(request).pixels[1]).any()


def test_the_example_leaks_nothing(
    build: Callable[[], Path],
    built_example: Callable[..., Path],
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CFLAGS", "-fsanitize=address")
    programs = built_example(build().parent, "-DCMAKE_CXX_FLAGS=-fsanitize=address")
    # Python is never ended and keeps what it has: only our own frames count, and as ours may be
    # the outer ones of Python's, only the innermost two are looked at.
    options = {"ASAN_OPTIONS": "malloc_context_size=2", "LSAN_OPTIONS": "exitcode=0"}
    done = run(programs / "load", tiny_model.bundle, 8, 50, 2, **options)
    assert done.returncode == 0, done.stderr
    assert "ERROR: AddressSanitizer" not in done.stderr
    assert not OURS.findall(done.stderr)
    figures = json.loads(done.stdout)
    assert figures["pictures"] + figures["cancelled"] == 48  # one is cancelled, soon enough or not
    assert (figures["refused"], figures["errors"]) == (1, 0)

    (tmp_path / "drawn").mkdir()
    served = subprocess.run(
        [programs / "service", tiny_model.bundle, tmp_path / "drawn"],
        input="a cat\na dog\n",
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **options},
    )
    assert served.returncode == 0, served.stderr
    assert not OURS.findall(served.stderr)
    for path, prompt in zip(served.stdout.split(), ("a cat", "a dog"), strict=True):
        with Image.open(path) as image:
            assert json.loads(image.info["sd-toolkit"])["recipes"][0]["prompt"] == prompt
    wrong = run(programs / "service", tmp_path, tmp_path, **options)
    assert wrong.returncode == 3
    assert "sd-export" in wrong.stderr


def test_programs_of_the_page_compile(compiled: Callable[..., Path], tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "embedding.md").read_text("utf-8")
    blocks = re.findall(r"```cpp\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "page.cpp").write_text("\n".join(reversed(blocks)))
    compiled(tmp_path / "page.cpp", "-fsyntax-only")


def test_a_build_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert main([str(tmp_path)]) == 2
    assert "no-such-compiler" in capsys.readouterr().err
    monkeypatch.setenv("CC", "false")
    with pytest.raises(ConfigError, match="the compiler failed"):
        build_library(tmp_path)
    monkeypatch.delenv("CC")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "cffi", None)
        with pytest.raises(BackendError, match="cffi is not installed"):
            build_library(tmp_path / "new")
    assert not any(tmp_path.iterdir()), "nothing is left of what fails"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        build_library(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
