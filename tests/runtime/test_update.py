"""A row of a table by numpy and by the kernel that a GPU runs, which g++ compiles here."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sd_runtime import guidance, update
from sd_runtime.guidance import guide
from sd_runtime.table import compile_table
from sd_runtime.update import Known, Update

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SHAPE = (2, 4, 3, 5)
CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
EPSILON = float(np.finfo(np.float32).eps)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


class Kernel:
    """What of ``cupy.ElementwiseKernel`` is used, on arrays of numpy's."""

    def __init__(self, folder: Path, *source: str) -> None:
        inputs, outputs, operation, name = source
        parts = [parameter.split() for parameter in f"{inputs}, {outputs}".split(", ")]
        assert {kind for kind, _ in parts} == {"float32"}
        self._names = [name for _, name in parts]
        self._num_inputs = inputs.count(",") + 1
        parameters = "".join(f", float *{n}_at, long {n}_step" for n in self._names)
        elements = "".join(f"float &{n} = {n}_at[i * {n}_step];" for n in self._names)
        code = f'extern "C" void {name}(long size{parameters}) {{'
        code += f"for (long i = 0; i < size; i++) {{ {elements} {operation} }} }}\n"
        file = folder / f"{name}-{len(list(folder.iterdir()))}.cpp"
        file.write_text(code)
        library = file.with_suffix(".so")
        command = ["g++", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", file, "-o", library]
        subprocess.run(command, check=True)
        self._function = ctypes.CDLL(str(library))[name]

    def __call__(self, *arguments: np.ndarray | float) -> None:
        assert len(arguments) == len(self._names)
        arrays = [np.asarray(argument, np.float32) for argument in arguments]
        for argument, array in zip(arguments, arrays, strict=True):
            assert isinstance(argument, float) or array is argument
            assert array.shape in ((), SHAPE)
            assert array.flags.c_contiguous
        size = ctypes.c_long(arrays[-1].size)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        steps = [ctypes.c_long(int(array.ndim > 0)) for array in arrays]
        both = (part for pair in zip(pointers, steps, strict=True) for part in pair)
        self._function(size, *both)


@pytest.fixture
def elementwise(tmp_path: Path) -> Callable[..., Kernel]:
    made: dict[tuple[str, ...], Kernel] = {}

    def find(*source: str) -> Kernel:
        if source not in made:
            made[source] = Kernel(tmp_path, *source)
        return made[source]

    return find


def drawn() -> Iterator[np.ndarray]:
    draw = np.random.default_rng(0)
    while True:
        yield draw.standard_normal(SHAPE).astype(np.float32)


@needs_compiler
@pytest.mark.parametrize("keeps", [False, True], ids=["", "inpainting"])
@pytest.mark.parametrize(
    ("scheduler", "most_terms"),
    [("ddim", 0), ("pndm", 3), ("dpm++_2m_sde_karras", 2), ("heun", 1), ("lms", 3), ("pndm_rk", 3)],
)
def test_the_kernel_computes_what_numpy_does(
    monkeypatch: pytest.MonkeyPatch,
    elementwise: Callable[..., Kernel],
    scheduler: str,
    most_terms: int,
    keeps: bool,
) -> None:
    config = CONFIG | {"skip_prk_steps": scheduler != "pndm_rk"}
    name = scheduler.removesuffix("_rk")
    table = compile_table(config, scheduler=name, num_inference_steps=7)
    numbers = drawn()
    repainted = np.zeros(SHAPE, np.float32)
    repainted[..., 2:] = 1
    known = Known(next(numbers) * (1 - repainted), next(numbers) * (1 - repainted), repainted)
    first = next(numbers)
    samples = first.copy(), first.copy()
    by_numpy, by_kernel = (
        Update(sample, table, known=known if keeps else None) for sample in samples
    )
    used: list[str] = []
    monkeypatch.setattr(by_kernel, "_on_host", False)
    monkeypatch.setattr(
        update, "elementwise", lambda *source: used.append(source[0]) or elementwise(*source)
    )
    for row in range(table.num_rows):
        output = next(numbers)
        noise = next(numbers) if table.draws_noise[row] else None
        for each in (by_numpy, by_kernel):
            each.apply(row, output.copy(), noise=noise)
        np.testing.assert_allclose(samples[1], samples[0], rtol=0, atol=64 * EPSILON)
        assert np.abs(samples[0]).max() < 64
    assert max(inputs.count("array") for inputs in used) == most_terms + 2 * keeps
    assert len(used) == table.num_rows


@needs_compiler
def test_guidance_by_its_kernel(
    monkeypatch: pytest.MonkeyPatch, elementwise: Callable[..., Kernel]
) -> None:
    uncond, text, found = (next(numbers) for numbers in [drawn()] for _ in range(3))
    kernel = elementwise(*guidance.KERNEL_SOURCE, "sd_guide")
    kernel(uncond, text, 7.5, found)
    expected = np.empty_like(found)
    guide(np.concatenate([uncond, text]), 7.5, out=expected, row=0, safety=None)
    np.testing.assert_allclose(found, expected, rtol=0, atol=64 * EPSILON)
    assert not np.allclose(found, text)


class Elsewhere:
    """An array that lives on a GPU, as far as `moved` can tell."""


def test_what_moves_to_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from sd_runtime import arrays

    def asarray(array: np.ndarray) -> Any:
        found = Elsewhere()
        found.numbers = array.copy()  # type: ignore[attr-defined]
        return found

    cupy = type("cupy", (), {"asarray": staticmethod(asarray)})
    monkeypatch.setattr(arrays, "import_package", lambda name, extra: cupy)
    array = np.arange(3)
    assert arrays.moved(array, like=np.empty(1)) is array
    there = arrays.moved(array, like=Elsewhere())
    assert isinstance(there, Elsewhere)
