"""Memory, given back between components."""

from __future__ import annotations

import ctypes
import gc


def release() -> None:
    """Give back what the last component held: its objects, and the heap they leave behind."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed heap otherwise
    if trim is not None:
        trim(0)
