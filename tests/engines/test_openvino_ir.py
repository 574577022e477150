"""A graph in OpenVINO's own form: one file, read where it lies, and nothing else."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sd_engines.backends import openvino, openvino_compiled, openvino_package
from sd_engines.backends.openvino_ir import read_ir, write_ir
from sd_engines.engine import load_engine
from sd_engines.errors import BackendError, ConfigError
from tiny_onnx import PROFILE, int8_engine, needs, unet_arrays, unet_reference

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines import Bundle
    from sd_engines.backends.openvino import OpenVinoEngine

needs("openvino")


@pytest.fixture
def written(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    unet = tiny_bundle.manifest.components["unet"]
    model = openvino_package.core().read_model(str(tiny_bundle.path / unet.file))
    path = tmp_path / "unet.engine"
    write_ir(model, path)
    return path


def loaded(bundle: Bundle, path: Path, **changes: str) -> OpenVinoEngine:
    (engine,) = (e for e in bundle.manifest.engines if e.backend == "openvino")
    return openvino.load(
        path,
        component=bundle.manifest.components["unet"],
        engine=replace(engine, precision="int8", **changes),  # type: ignore[arg-type]
        max_batch=2,
        threads=1,
    )


def test_what_is_read_is_what_was_written(written: Path) -> None:
    assert [p.name for p in written.parent.iterdir() if p.is_file()] == ["unet.engine"]
    model, mapped = read_ir(written)
    compiled = openvino_package.core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    arrays = unet_arrays(2)
    found = next(iter(compiled(arrays).values()))
    np.testing.assert_allclose(found, unet_reference(**arrays), rtol=1e-5, atol=2e-6)
    del compiled, model, mapped


def test_a_graph_that_computes_nothing_in_8_bits_is_refused(
    tiny_bundle: Bundle, written: Path
) -> None:
    with (
        loaded(tiny_bundle, written) as engine,
        pytest.raises(BackendError, match="computes nothing of the graph in int8"),
    ):
        engine.bind(1)


def test_a_binding_outlives_its_engine(
    tiny_bundle: Bundle, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO reads the weights where the file is mapped, whoever holds on to what is left."""
    monkeypatch.setattr(openvino_compiled, "computes_in_8_bits", lambda compiled: True)
    engine = loaded(tiny_bundle, written)
    binding = engine.bind(2)
    del engine
    gc.collect()
    arrays = unet_arrays(2)
    for name, array in arrays.items():
        binding.inputs[name][...] = array
    binding.run()
    found = binding.outputs["noise_pred"]
    np.testing.assert_allclose(found, unet_reference(**arrays), rtol=1e-5, atol=2e-6)


HOSTILE = {
    "empty": b"",
    "short": b"\x01\x00\x00",
    "no graph": bytes(64),
    "longer than itself": bytes(64) + (1000).to_bytes(8, "little"),
    "endless": b"\xff" * 64,
    "no xml": bytes(64) + b"<net" + (4).to_bytes(8, "little"),
    "no text": bytes(64) + b"\xff\xfe" + (2).to_bytes(8, "little"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path: Path, name: str) -> None:
    path = tmp_path / "unet.engine"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(BackendError, match="OpenVINO cannot read") as caught:
        read_ir(path)
    assert "--precision int8" in caught.value.hint


def test_weights_that_are_cut_off(written: Path) -> None:
    data = written.read_bytes()
    length = int.from_bytes(data[-8:], "little")
    written.write_bytes(data[-8 - length :])  # the graph is whole, the weights are gone
    with pytest.raises(BackendError, match="OpenVINO cannot read"):
        read_ir(written)


def test_it_is_not_compiled_from_onnx(tiny_bundle: Bundle) -> None:
    unet = tiny_bundle.manifest.components["unet"]
    with pytest.raises(ConfigError, match="calibrated on pictures") as caught:
        openvino.build(
            tiny_bundle.path / unet.file,
            output_dir=tiny_bundle.path,
            component="unet",
            entry=unet,
            profile=PROFILE,
            precision="int8",
        )
    assert "sd-export build" in caught.value.hint


def test_no_lora_is_put_on_8_bits(tiny_bundle: Bundle, written: Path) -> None:
    with pytest.raises(ConfigError, match="are built into it") as caught:
        load_engine(
            written,
            component=tiny_bundle.manifest.components["unet"],
            engine=int8_engine("unet"),
            max_batch=2,
            weights={"weight": np.zeros(1, np.float32)},
        )
    assert "than int8" in caught.value.hint
