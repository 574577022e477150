"""How a bundle comes to be: fsynced, manifest last, put in place by one rename."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sd_engines.entries import PORTABLE_BACKENDS
from sd_engines.errors import BundleError, ConfigError
from sd_engines.files import check_file, listed_files, read_manifest
from sd_engines.node import MANIFEST_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sd_engines.entries import CertificateEntry, EngineEntry
    from sd_engines.manifest import Manifest, SizeEntry

_Size = TypeVar("_Size", "Manifest", "SizeEntry")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_DISK_HINT = "Make room on the disk and the folder writable, then run the same command again."


def check_replaceable(target: Path) -> None:
    """`ConfigError` where something else than a bundle or an empty folder is at ``target``."""
    if target.is_dir():
        if (target / MANIFEST_NAME).is_file() or not any(target.iterdir()):
            return
    elif not target.exists():
        return
    raise ConfigError(
        f"{target} exists and is no bundle, so it is not replaced",
        "Name another --output, or remove it.",
    )


def seal(staging: Path, target: Path, manifest: Manifest) -> None:
    """Turn ``staging`` into the bundle at ``target``; ``staging`` is gone afterwards.

    ``staging`` must lie on the file system of ``target`` and hold exactly the files that
    ``manifest`` lists. An older bundle at ``target`` is exchanged in one step and then removed;
    anything else there is left alone and refused, as by `check_replaceable`.
    """
    target = Path(os.path.realpath(target))
    text = manifest.to_json()
    check_replaceable(target)
    files = listed_files(manifest)
    for name, entry in files.items():
        check_file(staging, name, entry.bytes)
    strays = {p.relative_to(staging).as_posix() for p in staging.rglob("*") if not p.is_dir()}
    if strays := strays - {*files, MANIFEST_NAME}:
        raise BundleError(
            f"{staging}: holds {', '.join(sorted(strays)[:3])}, which the manifest does not list",
            "List it in the manifest, or remove it before sealing.",
        )
    with _disk_errors(target):
        for name in files:
            _fsync(staging / name)
        _write_manifest(staging, text)
        for folder in (*(p for p in staging.rglob("*") if p.is_dir()), staging):
            _fsync(folder)
        _put_in_place(staging, target)
        _fsync(target.parent)


def add_engines(
    path: Path,
    staging: Path,
    *,
    engines: Iterable[EngineEntry],
    certificate: Iterable[CertificateEntry] = (),
    height: int | None = None,
    width: int | None = None,
) -> Manifest:
    """Add ``engines`` to the bundle at ``path``; their built files are moved from ``staging``.

    They are of the graphs of its size ``height``×``width``, None: its own; every size that has the
    same graph has its engines.

    An entry of the same component, backend, target, precision and, unless it is portable, version
    is replaced, and so are certificate entries of the same component, backend, precision
    and reference. At every moment the bundle is complete: a file is replaced only while no manifest
    lists it. Callers take turns. Returns the new manifest; `BundleError` as `seal`.
    """
    engines, certificate = tuple(engines), tuple(certificate)
    built = [e for e in engines if e.is_built]
    for engine in built:
        check_file(staging, engine.file, engine.bytes)
    with _disk_errors(path), _locked(path):
        old = read_manifest(path)
        new_files = {e.file for e in built}
        graphs = old.at(height, width).components

        def belongs(entry: EngineEntry | CertificateEntry, size: Manifest | SizeEntry) -> bool:
            return size.components.get(entry.component) == graphs.get(entry.component)

        def without(size: _Size) -> _Size:
            gone = {_identity(e) for e in engines if belongs(e, size)}
            measured = {_measured(c) for c in certificate if belongs(c, size)}
            kept = [e for e in size.engines if _identity(e) not in gone]
            return replace(
                size,
                engines=tuple(e for e in kept if e.file not in new_files),
                certificate=tuple(c for c in size.certificate if _measured(c) not in measured),
            )

        def added(size: _Size) -> _Size:
            return replace(
                size,
                engines=size.engines + tuple(e for e in engines if belongs(e, size)),
                certificate=size.certificate + tuple(c for c in certificate if belongs(c, size)),
            )

        kept = replace(without(old), sizes=tuple(map(without, old.sizes)))
        new = replace(added(kept), sizes=tuple(map(added, kept.sizes)))
        text = new.to_json()
        gone = listed_files(old).keys() - listed_files(new).keys()
        if new_files & listed_files(old).keys():
            _write_manifest(path, kept.to_json())
        for name in new_files:
            _fsync(staging / name)
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(path / name)
            _fsync((path / name).parent)
            _fsync((path / name).parent.parent)
        _write_manifest(path, text)
        for name in gone:
            (path / name).unlink(missing_ok=True)
            _remove_empty((path / name).parent)
    return new


def _identity(engine: EngineEntry) -> tuple[str, ...]:
    """What two engines of one bundle may not share; a portable backend runs any version's."""
    version = "" if engine.backend in PORTABLE_BACKENDS else engine.version
    return engine.component, engine.backend, version, engine.target, engine.precision


def _measured(entry: CertificateEntry) -> tuple[str, ...]:
    return entry.component, entry.backend, entry.precision, entry.reference


def _write_manifest(folder: Path, text: str) -> None:
    """Replace ``folder/bundle.json`` in one step."""
    temporary = folder / f".{MANIFEST_NAME}.{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / MANIFEST_NAME)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(folder)


def _put_in_place(staging: Path, target: Path) -> None:
    """Rename ``staging`` to ``target``; what was at ``target`` is removed after the exchange."""
    if not target.exists():
        staging.rename(target)
        return
    if _exchange(staging, target):
        shutil.rmtree(staging)
        return
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one system call; False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of the folder itself, so that no lock file is left behind."""
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), path.stat()):  # not sealed anew meanwhile
                yield
                return
        finally:
            os.close(descriptor)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(f"{path}: could not be written: {error}", _DISK_HINT) from error
