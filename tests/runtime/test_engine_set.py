"""Engines opened, bound and closed together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sd_engines.errors import BackendError, BundleError, ConfigError
from sd_runtime.engine_set import EngineSet
from tiny_onnx import unet_arrays

if TYPE_CHECKING:
    from sd_engines import Bundle


def test_binding_hands_out_the_engines_own_buffers(tiny_bundle: Bundle) -> None:
    with EngineSet.open(tiny_bundle, ["unet"], backend="openvino", threads=1) as engines:
        engines.bind({("unet", 1), ("unet", 2)})
        bound = engines["unet"].bind(2)
        for name, array in unet_arrays(2).items():
            bound.inputs[name][...] = array
        engines.bind({("unet", 2)})
        assert engines["unet"].bind(2) is bound
        bound.run()
        assert bound.outputs["noise_pred"].any()


def test_an_error_of_one_thread_arrives(tiny_bundle: Bundle) -> None:
    with (
        EngineSet.open(tiny_bundle, ["unet"], backend="onnxruntime", threads=1) as engines,
        pytest.raises(ConfigError, match="99"),
    ):
        engines.bind({("unet", 1), ("unet", 99)})


def test_what_opened_is_closed_where_another_fails(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sd_runtime import engine_set

    opened = []

    def open_and_keep(*arguments: object, **options: object) -> object:
        opened.append(original(*arguments, **options))
        return opened[-1]

    original = engine_set.open_engine
    monkeypatch.setattr(engine_set, "open_engine", open_and_keep)
    with pytest.raises(BundleError, match="no component 'moon'"):
        EngineSet.open(tiny_bundle, ["unet", "moon"], backend="onnxruntime", threads=1)
    with pytest.raises(BackendError, match="closed"):
        opened[0].bind(1)
