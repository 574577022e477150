"""ONNX Runtime and OpenVINO: the same contract, checked against numpy and at the border."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sd_engines import open_bundle, open_engine
from sd_engines.bundle import Bundle
from sd_engines.engine import build_engine
from sd_engines.errors import BackendError, BundleError, ConfigError
from tiny_onnx import PROFILE, make_bundle, needs, unet_arrays, unet_entry, unet_reference

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sd_engines import Engine

PORTABLE = ["onnxruntime", "openvino"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("portable") / "bundle")


@pytest.fixture(params=PORTABLE)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    needs(name)
    return name


@pytest.fixture
def engine(bundle: Bundle, backend: str) -> Iterator[Engine]:
    with open_engine(bundle, "unet", backend=backend, threads=1) as engine:
        yield engine


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_equals_numpy(engine: Engine, batch: int) -> None:
    arrays = unet_arrays(batch)
    noise_pred = engine(**arrays)["noise_pred"]
    assert noise_pred.dtype == np.float32
    np.testing.assert_allclose(noise_pred, unet_reference(**arrays), rtol=1e-5, atol=2e-6)


def test_binding_runs_in_place(engine: Engine) -> None:
    binding = engine.bind(2)
    sample, noise_pred = binding.inputs["sample"], binding.outputs["noise_pred"]
    address = noise_pred.ctypes.data
    for seed in (1, 2):  # the second run must see the second inputs, in the same memory
        arrays = unet_arrays(2, seed=seed)
        for name, array in arrays.items():
            binding.inputs[name][...] = array
        noise_pred.fill(np.nan)
        binding.run()
        np.testing.assert_allclose(noise_pred, unet_reference(**arrays), rtol=1e-5, atol=2e-6)
    assert binding.inputs["sample"] is sample
    assert binding.outputs["noise_pred"] is noise_pred
    assert noise_pred.ctypes.data == address
    assert engine.bind(2) is binding


def test_run_allocates_no_array(engine: Engine) -> None:
    binding = engine.bind(4)
    binding.run()
    tracemalloc.start()
    try:
        binding.run()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(10):
            binding.run()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = binding.outputs["noise_pred"].nbytes
    assert size == 4096
    assert peak - before < size / 2  # numpy reports its memory: one copy would show
    assert after - before < size / 2


def test_batches_do_not_share_buffers(engine: Engine) -> None:
    one, two = engine.bind(1), engine.bind(2)
    assert one is not two
    arrays = {1: unet_arrays(1, seed=5), 2: unet_arrays(2, seed=6)}
    for batch, binding in ((1, one), (2, two)):
        for name, array in arrays[batch].items():
            binding.inputs[name][...] = array
    one.run()
    two.run()
    for batch, binding in ((1, one), (2, two)):
        reference = unet_reference(**arrays[batch])
        np.testing.assert_allclose(binding.outputs["noise_pred"], reference, rtol=1e-5, atol=2e-6)


def test_call_leaves_bindings_alone(engine: Engine) -> None:
    binding = engine.bind(2)
    binding.inputs["sample"][...] = 7
    first = engine(**unet_arrays(2, seed=1))["noise_pred"]
    kept = first.copy()
    engine(**unet_arrays(2, seed=2))
    assert (binding.inputs["sample"] == 7).all()
    assert (first == kept).all()  # the caller's own


def test_batch_row_equals_its_solo_run(engine: Engine) -> None:
    arrays = unet_arrays(3)
    together = engine(**arrays)["noise_pred"]
    for row in range(3):
        solo = engine(**{name: array[row : row + 1] for name, array in arrays.items()})
        np.testing.assert_allclose(solo["noise_pred"][0], together[row], rtol=1e-5, atol=2e-6)


def test_input_may_be_strided(engine: Engine) -> None:
    arrays = unet_arrays(2)
    strided = {name: np.repeat(array, 2, axis=0)[::2] for name, array in arrays.items()}
    assert not strided["sample"].flags["C_CONTIGUOUS"]
    assert (engine(**strided)["noise_pred"] == engine(**arrays)["noise_pred"]).all()


def test_many_threads(engine: Engine) -> None:
    arrays = [unet_arrays(1 + seed % 3, seed=seed) for seed in range(24)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda a: engine(**a)["noise_pred"], arrays))
    for inputs, result in zip(arrays, results, strict=True):
        np.testing.assert_allclose(result, unet_reference(**inputs), rtol=1e-5, atol=2e-6)


def test_closed(bundle: Bundle, backend: str) -> None:
    engine = open_engine(bundle, "unet", backend=backend)
    binding = engine.bind(1)
    with engine:
        binding.run()
    with pytest.raises(BackendError, match="closed"):
        binding.run()
    with pytest.raises(BackendError, match="closed"):
        engine.bind(1)
    with pytest.raises(BackendError, match="closed") as caught:
        engine(**unet_arrays(1))
    assert "open_engine" in caught.value.hint
    engine.close()


def _without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in unet_arrays(2).items() if key != name}


BORDER = {
    "missing": (_without("timestep"), "input 'timestep' is missing"),
    "unknown": ({**unet_arrays(2), "timesteps": np.zeros(2)}, "no input 'timesteps'"),
    "dtype": (
        {**unet_arrays(2), "sample": unet_arrays(2)["sample"].astype(np.float64)},
        "'sample' is float64, not float32",
    ),
    "list": ({**unet_arrays(2), "timestep": [1.0, 2.0]}, "'timestep' is list, not float32"),
    "rank": ({**unet_arrays(2), "sample": np.zeros((2, 4, 8), np.float32)}, r"shape \(2, 4, 8\)"),
    "size": ({**unet_arrays(2), "sample": np.zeros((2, 4, 8, 9), np.float32)}, "has shape"),
    "scalar": ({**unet_arrays(2), "sample": np.float32(1)}, "has shape"),
    "batches": ({**unet_arrays(2), "timestep": np.zeros(1, np.float32)}, "'timestep' has shape"),
    "batch 0": (unet_arrays(0), "batch 0 is outside 1 to 4"),
    "batch 5": (unet_arrays(5), "batch 5 is outside 1 to 4"),
}


@pytest.mark.parametrize("name", BORDER)
def test_border(engine: Engine, name: str) -> None:
    arrays, message = BORDER[name]
    with pytest.raises(ConfigError, match=message):
        engine(**arrays)


@pytest.mark.parametrize("batch", [-1, 0, 5])
def test_bind_outside_the_profile(engine: Engine, batch: int) -> None:
    with pytest.raises(ConfigError, match=f"batch {batch} is outside 1 to 4"):
        engine.bind(batch)


@pytest.mark.parametrize("pictures", [-1, 0, 3, 8])
def test_bind_for_pictures_that_rows_do_not_share(engine: Engine, pictures: int) -> None:
    with pytest.raises(ConfigError, match=f"4 rows are not shared by {pictures} pictures"):
        engine.bind(4, pictures=pictures)


def test_half_precision_graph(tmp_path: Path, backend: str) -> None:
    """float32 at the border, fp16 inside: off by fp16's rounding, and no more."""
    bundle = make_bundle(tmp_path / "bundle")
    unet = unet_entry(bundle.path, dtype="float16", precision="fp16")
    entry = build_engine(
        backend,
        bundle.path / unet.file,
        output_dir=bundle.path,
        component="unet",
        entry=unet,
        profile=PROFILE,
    )
    assert entry.precision == {"onnxruntime": "fp16", "openvino": "fp32"}[backend]
    manifest = replace(bundle.manifest, components={"unet": unet}, engines=(entry,))
    arrays = unet_arrays(2)
    with open_engine(Bundle(bundle.path, manifest), "unet") as engine:
        error = np.abs(engine(**arrays)["noise_pred"] - unet_reference(**arrays)).max()
    assert 1e-5 < error < 1e-2


def test_manifest_says_another_border_than_the_graph(bundle: Bundle, backend: str) -> None:
    unet = bundle.manifest.components["unet"]
    for changed in (
        replace(unet, inputs=unet.inputs[:-1]),
        replace(unet, outputs=(replace(unet.outputs[0], name="images"),)),
        replace(unet, inputs=(*unet.inputs[:-1], replace(unet.inputs[-1], dtype="float16"))),
    ):
        manifest = replace(bundle.manifest, components={"unet": changed})
        with pytest.raises(BundleError, match="the manifest's"):
            open_engine(Bundle(bundle.path, manifest), "unet", backend=backend)


def test_no_onnx_at_all(tmp_path: Path, backend: str) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle.path / "unet/model.onnx").write_bytes(b"nonsense")
    module = __import__(f"sd_engines.backends.{backend}", fromlist=["load"])
    with pytest.raises(BackendError, match=r"cannot (open|read) .*model\.onnx") as caught:
        module.load(
            bundle.path / "unet/model.onnx",
            component=bundle.manifest.components["unet"],
            engine=bundle.manifest.engines[PORTABLE.index(backend)],
            max_batch=4,
        )
    assert caught.value.__cause__ is not None


def test_altered_onnx_is_not_opened(tmp_path: Path, backend: str) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    path = bundle.path / "unet/model.onnx_data"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    for name in (backend, "auto"):
        with pytest.raises(BundleError, match=r"model\.onnx_data: altered"):
            open_engine(open_bundle(bundle.path), "unet", backend=name)


def test_package_missing(bundle: Bundle, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(BackendError, match="cannot be imported") as caught:
        open_engine(bundle, "unet", backend=backend)
    assert caught.value.hint == 'pip install "sd-toolkit[cpu]"'
    assert caught.value.exit_code == 4


RUN_ONCE = """
import sys
from sd_engines import open_bundle, open_engine
with open_engine(open_bundle(sys.argv[1]), "unet", backend=sys.argv[2]) as engine:
    engine.bind(1).run()
"""


def test_nothing_is_written_or_sent(bundle: Bundle, backend: str, tmp_path: Path) -> None:
    """Both packages write an identifier for their telemetry into HOME, unless stopped."""
    quiet = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY")}
    before = {p: p.stat().st_mtime_ns for p in bundle.path.rglob("*")}
    subprocess.run(
        [sys.executable, "-c", RUN_ONCE, str(bundle.path), backend],
        env={**quiet, "HOME": str(tmp_path)},
        cwd=tmp_path,
        check=True,
    )
    assert list(tmp_path.rglob("*")) == []
    assert {p: p.stat().st_mtime_ns for p in bundle.path.rglob("*")} == before


OPEN_IN_THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from sd_engines import open_bundle, open_engine
bundle = open_bundle(sys.argv[1])
with ThreadPoolExecutor(8) as pool:
    opening = [pool.submit(open_engine, bundle, "unet", backend=sys.argv[2]) for _ in range(8)]
    for future in opening:
        future.result().close()
"""


def test_a_fresh_process_opens_engines_in_many_threads(bundle: Bundle, backend: str) -> None:
    command = [sys.executable, "-c", OPEN_IN_THREADS, str(bundle.path), backend]
    for _ in range(3):
        subprocess.run(command, check=True)
