"""What OpenVINO's users share: its package, imported without telemetry, and its one core."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any

from sd_engines.border import import_package

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOADING = RLock()
"""Engines may be opened by several threads at once."""
_cores: list[Any] = []


def package() -> Any:
    """The module openvino; `BackendError` with the extra to install where it is missing."""
    with _LOADING:
        if "openvino" in sys.modules or importlib.util.find_spec("openvino") is None:
            return import_package("openvino", extra="cpu")
        with without_telemetry():
            return import_package("openvino", extra="cpu")


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Imports in the block find no telemetry: openvino's and nncf's.

    ``import openvino`` alone sends an event to Intel and writes ``~/intel``; where its telemetry
    package cannot be imported, it takes an empty stub instead.
    """
    with _LOADING:
        telemetry = "openvino_telemetry"
        before = {name: sys.modules[name] for name in (telemetry,) if name in sys.modules}
        sys.modules[telemetry] = None  # type: ignore[assignment]  # an import of it now fails
        try:
            yield
        finally:
            del sys.modules[telemetry]
            sys.modules.update(before)


def core() -> Any:
    """The one ``Core`` of this process, which is never freed.

    A ``Core`` takes the thread's alternate signal stack, and when it is freed puts back the one
    it found: of two freed in the order they were made, the second puts back freed memory, and
    the next signal, Ctrl-C say, is a segmentation fault.
    """
    module = package()
    with _LOADING:
        if not _cores:
            _cores.append(module.Core())
        return _cores[0]
