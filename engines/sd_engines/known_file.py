"""Large files that were hashed on this machine before, and that nobody has changed since.

Gigabytes take seconds to hash, in every process that opens them. A file is taken for what it was
while the file system says the same of it, as git does: its place, its size, and when it was written
and changed. The last of these no program can set.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Final, NamedTuple

from sd_engines.cache import cached_file, read_cached, write_cached

_FEWEST_BYTES: Final = 8 << 20
"""Smaller ones are hashed sooner than it matters."""
_SETTLED_NS: Final = 2_000_000_000
"""What changed less long ago may change once more at the same time of the file system's clock."""


class FileState(NamedTuple):
    """What the file system says of a file. Times are nanoseconds since 1970."""

    path: str
    device: int
    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int


def file_state(path: Path) -> FileState | None:
    """The state of the file at ``path``; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return FileState(
        os.path.realpath(path),
        stat.st_dev,
        stat.st_ino,
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
    )


def is_known(state: FileState | None, sha256: str) -> bool:
    """Whether a file in just this ``state`` was hashed before, to ``sha256``."""
    if state is None or state.bytes < _FEWEST_BYTES:
        return False
    return read_cached(_memory_path(state)) == _line(state, sha256)


def remember(state: FileState | None, sha256: str) -> None:
    """That a file hashed to ``sha256``, begun when it was in ``state``.

    Unless it is small, or has changed since or a moment before.
    """
    if state is None or state.bytes < _FEWEST_BYTES:
        return
    is_settled = time.time_ns() - state.changed_ns >= _SETTLED_NS
    if is_settled and file_state(Path(state.path)) == state:
        write_cached(_memory_path(state), _line(state, sha256))


def _memory_path(state: FileState) -> Path | None:
    name = hashlib.sha256(os.fsencode(state.path)).hexdigest()[:32]
    return cached_file(f"hashed/{name}")


def _line(state: FileState, sha256: str) -> bytes:
    return " ".join([sha256, *map(str, state[1:]), state.path]).encode(errors="surrogateescape")
