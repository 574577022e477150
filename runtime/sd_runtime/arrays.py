"""Crossing between host arrays (numpy) and an engine's own (numpy, or CuPy on a GPU)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.border import import_package
from sd_engines.errors import BundleError
from sd_engines.node import REMAKE_HINT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sd_engines.engine import Array


def copy_into(target: Array, source: Array) -> None:
    """Write ``source`` into ``target``, wherever each of them lives.

    `BundleError` where their shapes differ: numpy would repeat what is one row, or one channel.
    """
    if target.shape != source.shape:
        raise BundleError(
            f"an array of {source.shape} has no place in one of {target.shape}", REMAKE_HINT
        )
    target[...] = moved(source, like=target)


def moved(array: Array, *, like: Array) -> Array:
    """``array``, or a copy of it where ``like`` lives.

    On its way to a GPU nobody waits: what is copied from is free to be changed at once. The other
    way the host waits.
    """
    if isinstance(like, np.ndarray):
        return to_host(array)
    return import_package("cupy", extra="cuda").asarray(array)


def to_host(array: Array) -> NDArray[Any]:
    """``array`` as numpy; waits for the GPU where it lives there."""
    return array if isinstance(array, np.ndarray) else array.get()


@cache
def elementwise(inputs: str, outputs: str, operation: str, name: str) -> Any:
    """A ``cupy.ElementwiseKernel``: one launch for what would be one a sum or product of arrays.

    Compiled when it first runs, and kept on disk by CuPy.
    """
    return import_package("cupy", extra="cuda").ElementwiseKernel(inputs, outputs, operation, name)
