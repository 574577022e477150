"""OpenVINO alone: the precision is what was asked for, and said."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from sd_engines import open_engine
from sd_engines.backends import openvino
from sd_engines.bundle import add_engines
from sd_engines.engine import build_engine
from sd_engines.errors import BackendError, BundleError, ConfigError
from tiny_onnx import PROFILE, needs, unet_arrays, unet_reference

if TYPE_CHECKING:
    from sd_engines import Bundle
    from sd_engines.manifest import EngineEntry
    from sd_engines.spec import Precision

needs("openvino")
capabilities = openvino._package().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


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
