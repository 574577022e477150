"""Ceilings count right, and the product that they time is one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sd_bench import ceiling
from sd_engines.cores import usable_cores
from sd_engines.errors import BackendError

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines.bundle import Bundle
    from sd_engines.entries import EngineEntry
    from sd_engines.spec import Precision

SIZE = 64


def unet_of(bundle: Bundle, backend: str) -> EngineEntry:
    return next(e for e in bundle.manifest.engines if e.backend == backend)


@pytest.fixture
def one_second_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still but for one second between two looks at the clock."""
    ticks = itertools.count()
    monkeypatch.setattr(ceiling, "clock", lambda: float(next(ticks)))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_product_is_a_product(backend: str, tiny_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    a = np.random.default_rng(1).standard_normal((1, SIZE, SIZE)).astype(np.float32)
    with ceiling._product(unet_of(tiny_bundle, backend), SIZE, 1, tmp_path) as product:
        found = product(a=a)["product"]
    np.testing.assert_allclose(found, a @ ceiling._random(SIZE, SIZE), rtol=1e-4, atol=1e-4)


def test_the_product_is_taken_in_the_engines_precision(tiny_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    a = ceiling._random(1, SIZE, SIZE)
    exact = a @ ceiling._random(SIZE, SIZE)
    errors = {}
    precision: Precision
    for precision in ("fp32", "bf16"):
        engine = replace(unet_of(tiny_bundle, "openvino"), precision=precision)
        folder = tmp_path / precision
        folder.mkdir()
        try:
            with ceiling._product(engine, SIZE, 1, folder) as product:
                errors[precision] = np.abs(product(a=a)["product"] - exact).max()
        except BackendError:
            pytest.skip("this processor has no bf16")
    assert errors["fp32"] < 1e-4 < errors["bf16"] < 1


@pytest.mark.parametrize(("precision", "backend"), [("int8", "openvino"), ("fp8", "onnxruntime")])
def test_the_product_is_taken_in_8_bits(
    tiny_bundle: Bundle, tmp_path: Path, precision: Precision, backend: str
) -> None:
    pytest.importorskip(backend)
    engine = replace(unet_of(tiny_bundle, backend), precision=precision)
    a = np.clip(ceiling._random(1, SIZE, SIZE), -3, 3)
    with ceiling._product(engine, SIZE, 1, tmp_path) as product:
        found = product(a=a)["product"]
    exact = a @ ceiling._random(SIZE, SIZE)
    assert 1e-3 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.05


@pytest.mark.usefixtures("one_second_a_run")
def test_rates_count_every_operation_and_byte(tiny_bundle: Bundle) -> None:
    assert ceiling.numpy_product_flops(size=SIZE) == 2 * SIZE**3
    assert ceiling.copy_bytes_per_s(num_bytes=4096, threads=3) == 2 * 4096
    engine = unet_of(tiny_bundle, "onnxruntime")
    assert ceiling.backend_product_flops(engine, size=SIZE, threads=1) == 2 * SIZE**3


@pytest.mark.usefixtures("one_second_a_run")
def test_one_product_a_precision(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "PRODUCT_SIZE", SIZE)
    monkeypatch.setattr(ceiling, "COPY_BYTES", 4096)
    unet = unet_of(tiny_bundle, "onnxruntime")
    half = replace(unet, precision="fp16", component="vae_decoder")
    found = ceiling.measure_ceilings([unet, half, unet], threads=usable_cores())
    assert list(found) == ["matmul_fp32_flops", "copy_bytes_per_s", "matmul_fp16_flops"]


def test_a_product_that_does_not_run_costs_no_other_figure(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> float:
        raise BackendError("the product does not fit", "Free memory.")

    monkeypatch.setattr(ceiling, "backend_product_flops", fails)
    assert ceiling.measure_ceilings([unet_of(tiny_bundle, "onnxruntime")], threads=1) == {}
    assert "no ceiling in fp32: the product does not fit" in caplog.text
