"""The bundle: opened, checked against its manifest, and read.

`bundle.json` is written last and everything arrives by rename, so whoever sees a manifest sees a
complete bundle. The format itself is in `engines/README.md` and read by `manifest`.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sd_engines.build_command import build_command
from sd_engines.entries import (
    BACKENDS,
    PORTABLE_BACKENDS,
    CertificateEntry,
    ComponentEntry,
    EngineEntry,
    FileEntry,
)
from sd_engines.errors import BundleError, EngineMismatchError
from sd_engines.files import check_file, hash_files, listed_files, read_manifest
from sd_engines.known_file import file_state, is_known, remember
from sd_engines.manifest import FORMAT_VERSION, Manifest, SizeEntry
from sd_engines.node import COPY_HINT, MANIFEST_NAME, REMAKE_HINT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from sd_engines.spec import Precision, Profile

__all__ = [
    "BACKENDS",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "PORTABLE_BACKENDS",
    "REMAKE_HINT",
    "Bundle",
    "CertificateEntry",
    "ComponentEntry",
    "EngineEntry",
    "FileEntry",
    "Manifest",
    "SizeEntry",
    "engine_entry",
    "engine_file",
    "engine_key",
    "hash_files",
    "open_bundle",
    "portable_entry",
]


@dataclass(frozen=True)
class Bundle:
    """A folder and its manifest. Files are checked when they are asked for, not before."""

    path: Path
    manifest: Manifest

    def at(self, height: int | None, width: int | None) -> Bundle:
        """The same, seen at another of its sizes, as `Manifest.at`."""
        return replace(self, manifest=self.manifest.at(height, width))

    def verified_path(self, name: str) -> Path:
        """The file called ``name``, its bytes checked; for a component, its ONNX and all its files.

        ``name`` is a component (``unet``) or a file of `Manifest.files`. `BundleError` where it is
        unknown, missing, of another size, or differs in one byte.
        """
        component = self.manifest.components.get(name)
        if component is not None:
            self._verify(component.files)
            return self.path / component.file
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: has no {name!r}", REMAKE_HINT)
        self._verify({name: self.manifest.files[name]})
        return self.path / name

    def verified_engine(self, engine: EngineEntry) -> Path:
        """The engine's file, checked; its key must be that of the ONNX that lies in the bundle.

        `EngineMismatchError` where the ONNX, the profile or a build flag changed since it was
        built; `BundleError` as `verified_path`.
        """
        if not engine.is_built:
            self.verified_path(engine.component)
            return self.path / engine.file
        again = build_command(self.path, engine)
        if engine.key != _key_of(engine, self.manifest):
            raise EngineMismatchError(
                f"{engine.file}: built from another {engine.component} than the bundle holds", again
            )
        hint = f"Build it again: {again}"
        self._verify({engine.file: FileEntry(sha256=engine.sha256, bytes=engine.bytes)}, hint=hint)
        return self.path / engine.file

    @contextmanager
    def verifying(self, engine: EngineEntry) -> Iterator[Path]:
        """The same file for a body that reads it, whose weights are hashed meanwhile.

        What tells a backend what to do, a graph or an engine that was built, is checked before the
        body runs. Weights are numbers: only their files' sizes are, and their bytes before it ends.
        Raises as `verified_engine`, in place of what the body raises.
        """
        if engine.is_built:
            yield self.verified_engine(engine)
            return
        component = self.manifest.components[engine.component]
        weights = dict(component.files)
        self._verify({engine.file: weights.pop(engine.file)})
        for name, entry in weights.items():
            check_file(self.path, name, entry.bytes)
        with ThreadPoolExecutor(1) as pool:
            hashing = pool.submit(self._verify, weights)
            try:
                yield self.path / engine.file
            finally:
                hashing.result()

    def verify(self) -> None:
        """Check every byte that the manifest lists; `BundleError` names the first file at fault.

        Nothing is taken for known: this finds what a disk has lost by itself, too.
        """
        files = listed_files(self.manifest)
        self._check_sizes(files)
        self._check_hashes(files)

    def _verify(self, files: Mapping[str, FileEntry], *, hint: str = COPY_HINT) -> None:
        self._check_sizes(files, hint=hint)
        states = {name: file_state(self.path / name) for name in files}
        unknown = {n: entry for n, entry in files.items() if not is_known(states[n], entry.sha256)}
        self._check_hashes(unknown, hint=hint)
        for name, entry in unknown.items():
            remember(states[name], entry.sha256)

    def _check_sizes(self, files: Mapping[str, FileEntry], *, hint: str = COPY_HINT) -> None:
        for name, entry in files.items():
            check_file(self.path, name, entry.bytes, hint=hint)

    def _check_hashes(self, files: Mapping[str, FileEntry], *, hint: str = COPY_HINT) -> None:
        for name, found in hash_files(self.path, files).items():
            if found.sha256 != files[name].sha256:
                raise BundleError(
                    f"{self.path / name}: altered: its SHA-256 is not the manifest's", hint
                )


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open the bundle at ``path``: its manifest, and that all its files are there, whole in size.

    No file is hashed yet: `Bundle.verified_path` and `Bundle.verify` do. `BundleError` where the
    folder is no bundle, is incomplete, or lists a file that lies outside of it.
    """
    root = Path(os.path.realpath(path))
    manifest = read_manifest(root)
    for name, entry in listed_files(manifest).items():
        check_file(root, name, entry.bytes)
    return Bundle(root, manifest)


def engine_key(
    onnx_sha256s: Iterable[str],
    *,
    batch_size: int,
    precision: Precision,
    backend: str,
    version: str,
    target: str,
    flags: Mapping[str, str],
) -> str:
    """SHA-256 over everything an engine depends on: equal keys mean the engine need not be rebuilt.

    ``onnx_sha256s`` are the hashes of all files of the component, in any order: they hold its size
    in pixels, ``batch_size`` is the profile's.
    """
    parts = {
        "backend": backend,
        "flags": dict(flags),
        "onnx": sorted(onnx_sha256s),
        "batch_size": batch_size,
        "precision": precision,
        "target": target,
        "version": version,
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def engine_entry(
    component: str,
    entry: ComponentEntry,
    profile: Profile,
    backend: str,
    *,
    version: str,
    target: str,
    precision: Precision,
    file: str,
    built: FileEntry,
    flags: Mapping[str, str],
) -> EngineEntry:
    """The entry of an engine that ``backend`` made of ``entry``: ``file``, which is ``built``."""
    return EngineEntry(
        component=component,
        backend=backend,
        version=version,
        target=target,
        precision=precision,
        file=file,
        sha256=built.sha256,
        bytes=built.bytes,
        flags=dict(flags),
        key=engine_key(
            (onnx.sha256 for onnx in entry.files.values()),
            batch_size=profile.batch_size,
            precision=precision,
            backend=backend,
            version=version,
            target=target,
            flags=flags,
        ),
    )


def engine_file(
    component: str,
    entry: ComponentEntry,
    backend: str,
    *,
    version: str,
    target: str,
    precision: Precision | None = None,
) -> str:
    """Where an engine built of ``entry`` lies in its bundle.

    That of ``unet/model.onnx`` is ``unet.engine``, that of ``unet/model-768x512.onnx`` beside it,
    and one in fp8 beside the one that is exact.
    """
    size = PurePosixPath(entry.file).stem.removeprefix("model")
    kind = ".fp8" if precision == "fp8" else ""
    return f"engines/{backend}-{version}-{target}/{component}{size}{kind}.engine"


def portable_entry(
    component: str,
    entry: ComponentEntry,
    profile: Profile,
    backend: str,
    *,
    version: str,
    target: str,
    precision: Precision | None,
) -> EngineEntry:
    """The engine entry of a backend that runs ``entry``'s ONNX as it is, in its own form of it.

    ``precision`` None: that of the graph.
    """
    file = entry.graph_for(backend)
    return engine_entry(
        component,
        entry,
        profile,
        backend,
        version=version,
        target=target,
        precision=precision or entry.precision,
        file=file,
        built=entry.files[file],
        flags={},
    )


def _key_of(engine: EngineEntry, manifest: Manifest) -> str:
    files = manifest.components[engine.component].files
    return engine_key(
        (entry.sha256 for entry in files.values()),
        batch_size=manifest.profile.batch_size,
        precision=engine.precision,
        backend=engine.backend,
        version=engine.version,
        target=engine.target,
        flags=engine.flags,
    )
