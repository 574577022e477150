"""Memory: how much was held, and how to give it back between components."""

from __future__ import annotations

import ctypes
import gc
import resource


def peak_bytes() -> int:
    """The most memory this process ever held resident, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release() -> None:
    """Give back what the last component held: its objects, and the heap they leave behind."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed heap otherwise
    if trim is not None:
        trim(0)
