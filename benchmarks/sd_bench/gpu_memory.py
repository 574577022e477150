"""How much memory engines hold on GPUs: what a process holds in RAM says nothing of it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from sd_bench.environment import nvidia_smi

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sd_engines.entries import EngineEntry

_QUERY = ("--query-gpu=memory.used", "--format=csv,noheader,nounits")


def held_on_gpus_bytes() -> int:
    """By anybody, on all GPUs of this machine, as nvidia-smi says; 0 where there is none.

    Processes are not told apart: in a container nvidia-smi cannot.
    """
    with suppress(ValueError):  # of a GPU that does not say
        return sum(int(mebibytes) << 20 for mebibytes in nvidia_smi(*_QUERY).split())
    return 0


def gpu_memory_bytes(engines: Iterable[EngineEntry], *, before: int) -> int:
    """What ``engines`` hold there, which held ``before`` when they opened; 0 where none is there.

    Backends and CuPy keep what they had: after a request it is the most that they took.
    """
    if all(engine.target == "cpu" for engine in engines):
        return 0
    return max(0, held_on_gpus_bytes() - before)
