"""How many cores this process may compute on: what backends ask the machine, not the container."""

from __future__ import annotations

import os

from sd_engines.kernel_file import kernel_text

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_CGROUP_QUOTA = "/sys/fs/cgroup/cpu.max"


def usable_cores() -> int:
    """Physical cores within this process's affinity and its container's CPU quota, at least 1.

    Two threads on one core gain nothing where both want its multipliers, and threads beyond the
    quota make the kernel stop all of them.
    """
    allowed = os.sched_getaffinity(0)
    cores = {kernel_text(_TOPOLOGY.format(cpu)).strip() or str(cpu) for cpu in allowed}
    quota, _, period = kernel_text(_CGROUP_QUOTA).strip().partition(" ")
    limit = int(quota) // int(period) if quota.isdigit() and period.isdigit() else len(cores)
    return max(1, min(len(cores), limit))
