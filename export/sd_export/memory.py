"""Memory, given back between components."""

from __future__ import annotations

import ctypes
import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def settled() -> Iterator[None]:
    """Spare what lives now, torch and all that came with it, from each look for garbage."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release() -> None:
    """Give back what the last component held: its objects, and the heap they leave behind."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed heap otherwise
    if trim is not None:
        trim(0)
