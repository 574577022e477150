"""What Linux says of the machine, in files that other systems do not have."""

from __future__ import annotations

from pathlib import Path


def kernel_text(path: str | Path, *, limit: int = -1) -> str:
    """Text of a file of the kernel's, at most the first ``limit`` characters; "" without one."""
    try:
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            return file.read(limit)
    except OSError:
        return ""
