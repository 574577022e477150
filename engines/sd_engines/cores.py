"""How many cores this process may compute on: what backends ask the machine, not the container."""

from __future__ import annotations

import os
from pathlib import Path

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Physical cores within this process's affinity and its container's CPU quota, at least 1.

    Two threads on one core gain nothing where both want its multipliers, and threads beyond the
    quota make the kernel stop all of them.
    """
    allowed = os.sched_getaffinity(0)
    cores = {_read(Path(_TOPOLOGY.format(cpu))) or str(cpu) for cpu in allowed}
    quota, _, period = _read(_CGROUP_QUOTA).partition(" ")
    limit = int(quota) // int(period) if quota.isdigit() and period.isdigit() else len(cores)
    return max(1, min(len(cores), limit))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
