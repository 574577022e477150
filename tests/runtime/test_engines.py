"""The engines of a pipeline are open all, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sd_engines.errors import BackendError, BundleError
from sd_runtime import engines
from sd_runtime.engines import open_engines

if TYPE_CHECKING:
    from sd_engines import Bundle


def test_what_opened_is_closed_where_another_fails(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def open_and_keep(*arguments: object, **options: object) -> object:
        opened.append(original(*arguments, **options))
        return opened[-1]

    original = engines.open_engine
    monkeypatch.setattr(engines, "open_engine", open_and_keep)
    with pytest.raises(BundleError, match="no component 'moon'"):
        open_engines(tiny_bundle, ["unet", "moon"], backend="onnxruntime", threads=1)
    with pytest.raises(BackendError, match="closed"):
        opened[0].bind(1)
