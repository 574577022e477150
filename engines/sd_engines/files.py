"""Files of a bundle: what they must be, and what their bytes hash to."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from shlex import quote
from stat import S_ISREG
from typing import TYPE_CHECKING

from sd_engines.entries import FileEntry
from sd_engines.errors import BundleError
from sd_engines.manifest import MAX_MANIFEST_BYTES, Manifest
from sd_engines.node import COPY_HINT, MANIFEST_NAME, READ_HINT

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_BLOCK_BYTES = 1 << 20


def read_manifest(root: Path) -> Manifest:
    """The manifest of the bundle at ``root``; `BundleError` where there is none to be trusted."""
    path = root / MANIFEST_NAME
    try:
        found = S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        found = False
    except PermissionError as error:
        raise unreadable(path, error) from error
    if not found:
        raise _no_bundle(root)
    try:
        with path.open("rb") as file:
            return Manifest.from_json(file.read(MAX_MANIFEST_BYTES + 1))
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> BundleError:
    """What is wrong with a bundle of which ``path`` cannot be read."""
    hint = READ_HINT if isinstance(error, PermissionError) else COPY_HINT
    return BundleError(f"{path}: {error.strerror}", hint)


def _no_bundle(root: Path) -> BundleError:
    if (root / "model_index.json").is_file():
        return BundleError(
            f"{root}: is a checkpoint, not a bundle",
            f"Make one of it: sd-export --model {quote(str(root))} --output BUNDLE",
        )
    if root.is_dir():
        return BundleError(
            f"{root}: has no {MANIFEST_NAME}, so it is no complete bundle", COPY_HINT
        )
    problem = "is a file, and a bundle is a folder" if root.exists() else "there is no such folder"
    return BundleError(
        f"{root}: {problem}",
        "Check the path, or make a bundle: sd-export --model MODEL --output BUNDLE",
    )


def listed_files(manifest: Manifest) -> dict[str, FileEntry]:
    """Every file that ``manifest`` lists, by its path in the bundle."""
    files = dict(manifest.files)
    for size in manifest.all_sizes:
        for component in size.components.values():
            files.update(component.files)
        for engine in size.engines:
            files[engine.file] = FileEntry(sha256=engine.sha256, bytes=engine.bytes)
    return files


def check_file(root: Path, name: str, size: int, *, hint: str = COPY_HINT) -> None:
    """Check that ``root/name`` is a real file of ``size`` bytes, reached through no link."""
    path = root / name
    if not os.path.isfile(path):  # noqa: PTH113  (false of a name that the disk cannot hold)
        raise BundleError(f"{path}: is missing", hint)
    if os.path.realpath(path) != os.path.join(os.path.realpath(root), name):  # noqa: PTH118
        raise BundleError(f"{path}: is a link, or lies behind one", hint)
    found = path.stat().st_size
    if found != size:
        raise BundleError(f"{path}: has {found} bytes, not {size}", hint)


def is_utf8(path: str | Path) -> bool:
    """Whether the bytes of ``path`` are UTF-8, as JSON and programs in C++ want names to be."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def hash_files(root: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """SHA-256 and size of files below ``root``, several at a time (hashlib releases the GIL)."""
    ordered = list(names)
    largest_first = sorted(ordered, key=lambda name: -_size(root / name))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = dict(
            zip(largest_first, pool.map(lambda n: _hash(root / n), largest_first), strict=True)
        )
    return {name: found[name] for name in ordered}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def _hash(path: Path) -> FileEntry:
    digest, size, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(block[:count])
                size += count
    except OSError as error:
        raise unreadable(path, error) from error
    return FileEntry(sha256=digest.hexdigest(), bytes=size)
