"""OpenVINO alone: the precision is what was asked for, and said."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sd_engines import open_engine
from sd_engines.backends import openvino_package
from sd_engines.cores import usable_cores
from sd_engines.engine import build_engine
from sd_engines.errors import BackendError, BundleError, ConfigError
from sd_engines.seal import add_engines
from tiny_onnx import PROFILE, needs, unet_arrays, unet_reference

if TYPE_CHECKING:
    from sd_engines import Bundle
    from sd_engines.entries import EngineEntry
    from sd_engines.spec import Precision

needs("openvino")
capabilities = openvino_package.core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _entry(bundle: Bundle, precision: Precision | None) -> EngineEntry:
    unet = bundle.manifest.components["unet"]
    return build_engine(
        "openvino",
        bundle.path / unet.file,
        output_dir=bundle.path,
        component="unet",
        entry=unet,
        profile=PROFILE,
        precision=precision,
    )


def test_default_is_fp32_even_where_there_is_bf16(tiny_bundle: Bundle) -> None:
    assert _entry(tiny_bundle, None).precision == "fp32"


@pytest.mark.skipif(usable_cores() < 2, reason="there is one core")
def test_it_computes_in_as_many_threads_as_are_asked_for(tiny_bundle: Bundle) -> None:
    found = []
    for threads in (1, 2):
        with open_engine(tiny_bundle, "unet", backend="openvino", threads=threads) as engine:
            engine.bind(1)
            ((moving, _),) = engine._compiled.values()  # type: ignore[attr-defined]
            found.append(moving.get_property("INFERENCE_NUM_THREADS"))
    assert found == [1, 2]


@pytest.mark.skipif("BF16" not in capabilities, reason="this processor has no bf16")
def test_bf16_is_asked_for(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="has no bf16 openvino engine of unet"):
        open_engine(tiny_bundle, "unet", backend="openvino", precision="bf16")
    entry = _entry(tiny_bundle, "bf16")
    manifest = add_engines(tiny_bundle.path, tiny_bundle.path, engines=[entry])
    bundle = type(tiny_bundle)(tiny_bundle.path, manifest)
    arrays, errors = unet_arrays(2), {}
    reference = unet_reference(**arrays)
    for precision in ("fp32", "bf16"):
        with open_engine(bundle, "unet", backend="openvino", precision=precision) as engine:
            errors[precision] = np.abs(engine(**arrays)["noise_pred"] - reference).max()
    assert errors["fp32"] < 2e-6 < 1e-3 < errors["bf16"] < 0.1


@pytest.mark.skipif("FP16" in capabilities, reason="this processor has fp16")
def test_precision_the_processor_lacks(tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="does not compute in fp16"):
        _entry(tiny_bundle, "fp16")
    engine = replace(tiny_bundle.manifest.engines[1], precision="fp16")
    bundle = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, engines=(engine,)))
    with pytest.raises(BackendError, match="does not compute in fp16") as caught:
        open_engine(bundle, "unet")
    again = f"sd-export build {bundle.path} --backend openvino --precision fp32"
    assert caught.value.hint == again


def test_unknown_target(tiny_bundle: Bundle) -> None:
    unet = tiny_bundle.manifest.components["unet"]
    with pytest.raises(ConfigError, match="unknown target 'gpu'"):
        build_engine(
            "openvino",
            tiny_bundle.path / unet.file,
            output_dir=tiny_bundle.path,
            component="unet",
            entry=unet,
            profile=PROFILE,
            target="gpu",
        )


TWO_ENGINES_THEN_A_SIGNAL = """
import signal, sys
from sd_engines import open_bundle, open_engine

bundle = open_bundle(sys.argv[1])
engines = [open_engine(bundle, "unet", backend="openvino") for _ in range(2)]
while engines:
    engines.pop(0).close()  # the first made is the first freed
signal.signal(signal.SIGINT, lambda number, frame: print("handled"))
signal.raise_signal(signal.SIGINT)
"""


def test_a_signal_after_engines_were_freed(tiny_bundle: Bundle) -> None:
    command = [sys.executable, "-c", TWO_ENGINES_THEN_A_SIGNAL, str(tiny_bundle.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
