"""The most memory that this process has held: one measure for exports and benchmarks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

from sd_engines.kernel_file import kernel_text


def peak_memory_bytes() -> int:
    """The most that this process has held in RAM since `reset_peak_memory`, or ever."""
    # Linux hands the ru_maxrss of whoever started a process down to it; VmHWM starts anew.
    for line in kernel_text("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return getrusage(RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Let `peak_memory_bytes` start from what is held now, where the kernel can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
