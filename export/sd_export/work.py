"""The work folder beside a bundle-to-be: one export at a time, and stages that outlive it.

``.NAME.export/`` holds the bundle as it grows and a record of the stages that are done, each with
a key over all that it depends on. An interrupted export leaves it; the next one goes on from
there. Success removes it, and so do errors but `NoRoomError`. The folder itself is the lock, so no
lock file is left.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_engines.bundle import hash_files
from sd_engines.errors import BundleError, ExportError, SdError
from sd_engines.seal import check_replaceable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_PACKAGES = ("sd-toolkit", "torch", "diffusers", "transformers", "onnx", "onnxscript", "tokenizers")
_BACKEND_PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx",),
}
_RECORDS = "stages.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ROOM_HINT = "Make room on the disk, or name an --output on another one; nothing was left behind."
_PLACE_HINT = "Name a place that can be written to; nothing was left behind."


class NoRoomError(ExportError):
    """The disk plainly has no room for what is not done yet; what is done is kept."""


class WorkFolder:
    """Stages done so far, and the folder ``bundle`` that will become the bundle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bundle = path / "bundle"
        self.bundle.mkdir(exist_ok=True)
        self._records: dict[str, Any] = _read_records(path / _RECORDS)

    def check_room(self, needed: int) -> None:
        """`NoRoomError` where the disk plainly has none for ``needed`` bytes of graphs.

        What earlier runs left here is of those, or is overwritten by them.
        """
        there = sum(path.stat().st_size for path in self.bundle.rglob("*") if path.is_file())
        free, needed = shutil.disk_usage(self.path).free, needed - there
        if free < needed:
            raise NoRoomError(
                f"the disk has {free / 1e9:.1f} GB free, the bundle may need {needed / 1e9:.1f} GB "
                "more",
                "Make room and run the same command again, which goes on from what is done, or "
                "name an --output on another disk.",
                component="bundle",
                stage="save",
            )

    def finished(self, stage: str, key: str) -> dict[str, Any] | None:
        """What `finish` was given for ``stage``, if ``key`` and every byte are the same today."""
        record = self._records.get(stage)
        if record is None or record["key"] != key:
            return None
        try:
            found = hash_files(self.path, record["files"])
        except BundleError:
            return None
        if {name: asdict(entry) for name, entry in found.items()} != record["files"]:
            return None
        data: dict[str, Any] = record["data"]
        return data

    def finish(self, stage: str, key: str, *, files: Sequence[str], data: dict[str, Any]) -> None:
        """Record that ``stage`` is done; ``files`` are below the work folder."""
        found = hash_files(self.path, files)
        self._records[stage] = {
            "key": key,
            "files": {name: asdict(entry) for name, entry in found.items()},
            "data": data,
        }
        temporary = self.path / f"{_RECORDS}.new"
        temporary.write_text(json.dumps(self._records))
        temporary.replace(self.path / _RECORDS)

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a later run would find anything done."""
        return bool(self._records)

    def remove_strays(self, listed: set[str]) -> None:
        """Remove from the growing bundle what earlier, different runs left in it."""
        for path in sorted(self.bundle.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.bundle).as_posix() not in listed:
                path.unlink()


@contextmanager
def work_folder(target: Path, *, waiting: Callable[[], None]) -> Iterator[WorkFolder]:
    """Hold the work folder of ``target``; ``waiting`` is called once if another export holds it.

    Raises `ConfigError` where ``target`` exists and is no bundle, and `ExportError` where the disk
    is full or not writable, or a file that is read cannot be.
    """
    check_replaceable(target)
    path = target.with_name(f".{target.name}.export")
    with _disk_errors(target):
        made = _make_parents(target.parent)
        try:
            descriptor = _lock(path, waiting)
        except BaseException:
            _remove_parents(made)
            raise
        keep = False
        try:
            work = WorkFolder(path)
            try:
                yield work
            except NoRoomError:
                keep = work.is_worth_keeping
                raise
            except (SdError, OSError, MemoryError):
                raise
            except BaseException:  # interrupted, or a bug: either way the stages are sound
                keep = work.is_worth_keeping
                raise
        finally:
            if not keep:
                shutil.rmtree(path, ignore_errors=True)
                _remove_parents(made)
            os.close(descriptor)


def key_of(made_of: Mapping[str, Any]) -> str:
    """SHA-256 over everything a stage depends on."""
    text = json.dumps(made_of, sort_keys=True, separators=(",", ":"), default=dict)
    return hashlib.sha256(text.encode()).hexdigest()


def versions(backends: Sequence[str]) -> dict[str, str]:
    """Installed versions of everything that has a hand in a bundle for ``backends``."""
    found = {name: _installed((name,)) for name in _PACKAGES}
    found |= {backend: backend_version(backend) for backend in backends}
    return {name: version for name, version in found.items() if version is not None}


def backend_version(backend: str) -> str | None:
    """The installed version of a backend's package, None where there is none."""
    return _installed(_BACKEND_PACKAGES[backend])


def _installed(names: Sequence[str]) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _lock(path: Path, waiting: Callable[[], None]) -> int:
    """An open descriptor of the folder ``path``, locked; the folder is made where it is not."""
    told = False
    while True:
        path.mkdir(exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # its holder finished in between
            continue
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    waiting()
                    told = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed while we waited


def _read_records(path: Path) -> dict[str, Any]:
    try:
        records = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return records if isinstance(records, dict) else {}


def _make_parents(folder: Path) -> list[Path]:
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_parents(made: list[Path]) -> None:
    for folder in made:  # deepest first; one that holds something now is someone's
        try:
            folder.rmdir()
        except OSError:
            return


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL and not _is_of(target, error.filename):
            raise ExportError(
                f"cannot read {str(error.filename)[:200]}: {error.strerror}",
                "Make it readable, or download the checkpoint again.",
                component="checkpoint",
                stage="load",
            ) from error
        raise ExportError(
            f"{target} cannot be written: {error.strerror or error}",
            _ROOM_HINT if error.errno in (*_FULL, None) else _PLACE_HINT,
            component="bundle",
            stage="save",
        ) from error


def _is_of(target: Path, name: object) -> bool:
    """Whether what failed lies where the bundle is made; an error that names no file is of that."""
    if not isinstance(name, str | bytes):
        return True
    path = Path(os.fsdecode(name)).absolute()
    places = (target, target.with_name(f".{target.name}.export"))
    return target.is_relative_to(path) or any(path.is_relative_to(place) for place in places)
