"""Crossing between host arrays (numpy) and an engine's own (numpy, or CuPy on a GPU)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sd_engines.engine import Array


def copy_into(target: Array, source: Array) -> None:
    """Write ``source`` into ``target``, wherever each of them lives."""
    if isinstance(target, np.ndarray):
        target[...] = to_host(source)
    elif isinstance(source, np.ndarray):
        target.set(np.ascontiguousarray(source))
    else:
        target[...] = source


def to_host(array: Array) -> NDArray[Any]:
    """``array`` as numpy; waits for the GPU where it lives there."""
    return array if isinstance(array, np.ndarray) else array.get()
