"""A bundle appears, is replaced and is extended whole, or not at all."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from sd_engines import open_bundle
from sd_engines.bundle import (
    CertificateEntry,
    EngineEntry,
    engine_key,
    hash_files,
)
from sd_engines.errors import BundleError, ConfigError
from sd_engines.seal import add_engines, seal
from tiny_onnx import PROFILE, make_bundle, make_manifest

if TYPE_CHECKING:
    from sd_engines import Bundle


def _files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def _hash(bundle: Bundle) -> str:
    return bundle.manifest.components["unet"].files["unet/model.onnx_data"].sha256


def _staged(tmp_path: Path, *, seed: int) -> tuple[Path, object]:
    staging = tmp_path / f"staging-{seed}"
    staging.mkdir()
    return staging, make_manifest(staging, seed=seed)


def test_nothing_left_behind(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle").verify()
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_replaces_an_older_bundle(tmp_path: Path) -> None:
    old = make_bundle(tmp_path / "bundle", seed=0)
    (old.path / "notes.txt").write_text("left by someone; goes with the old bundle")
    new = make_bundle(tmp_path / "bundle", seed=1)
    new.verify()
    assert _hash(new) != _hash(old)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert "notes.txt" not in _files(new.path)


def test_replaces_where_the_kernel_cannot_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_bundle(tmp_path / "bundle", seed=0)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())  # a libc without renameat2
    new = make_bundle(tmp_path / "bundle", seed=1)
    new.verify()
    assert _hash(new) != _hash(old)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_into_an_empty_folder_and_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    staging, manifest = _staged(tmp_path, seed=0)
    seal(staging, tmp_path / "link", manifest)  # type: ignore[arg-type]
    assert (tmp_path / "link").is_symlink()
    open_bundle(tmp_path / "real").verify()


def test_leaves_alone_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    staging, manifest = _staged(tmp_path, seed=0)
    with pytest.raises(ConfigError, match="exists and is no bundle"):
        seal(staging, tmp_path / "home", manifest)  # type: ignore[arg-type]
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"
    with pytest.raises(ConfigError, match="exists and is no bundle"):
        seal(staging, tmp_path / "home" / "thesis.tex", manifest)  # type: ignore[arg-type]
    assert _files(staging)  # and the work is kept


def test_staging_must_hold_what_is_listed_and_no_more(tmp_path: Path) -> None:
    staging, manifest = _staged(tmp_path, seed=0)
    (staging / "unet" / "scratch").write_text("x")
    with pytest.raises(BundleError, match="unet/scratch, which the manifest does not list"):
        seal(staging, tmp_path / "bundle", manifest)  # type: ignore[arg-type]
    (staging / "unet" / "scratch").unlink()
    (staging / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(BundleError, match="is missing"):
        seal(staging, tmp_path / "bundle", manifest)  # type: ignore[arg-type]
    assert not (tmp_path / "bundle").exists()


def test_full_disk(tmp_path: Path) -> None:
    old = make_bundle(tmp_path / "bundle", seed=0)
    staging, manifest = _staged(tmp_path, seed=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # bundle.json is longer
    try:
        with pytest.raises(BundleError, match="could not be written") as caught:
            seal(staging, old.path, manifest)  # type: ignore[arg-type]
        with pytest.raises(BundleError, match="could not be written"):
            add_engines(old.path, staging, engines=old.manifest.engines)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "disk" in caught.value.hint
    assert open_bundle(old.path) == old
    old.verify()
    assert not [name for name in _files(tmp_path) if ".bundle.json" in name]


SEAL_FOREVER = """
import itertools, pathlib, sys
from tiny_onnx import make_bundle
for seed in itertools.count():
    make_bundle(pathlib.Path(sys.argv[1]), seed=seed % 2)
    print(seed, flush=True)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """There is always a whole bundle at the target, for readers during and after."""
    target = tmp_path / "bundle"
    for delay in (0.0, 0.011, 0.023):
        process = subprocess.Popen(
            [sys.executable, "-c", SEAL_FOREVER, str(target)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        for _ in range(20):
            open_bundle(target)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        open_bundle(target).verify()
        for leftover in tmp_path.iterdir():  # of the killed process: a rerun starts afresh
            if leftover != target:
                subprocess.run(["rm", "-r", str(leftover)], check=True)


def _built(staging: Path, bundle: Bundle, *, content: bytes, target: str = "any") -> EngineEntry:
    """An entry whose file holds ``content``: moving files needs no real plan."""
    file = f"engines/tensorrt-rtx-1.7-{target}/unet.engine"
    (staging / file).parent.mkdir(parents=True, exist_ok=True)
    (staging / file).write_bytes(content)
    found = hash_files(staging, [file])[file]
    return EngineEntry(
        component="unet",
        backend="tensorrt-rtx",
        version="1.7",
        target=target,
        precision="fp32",
        file=file,
        sha256=found.sha256,
        bytes=found.bytes,
        flags={},
        key=engine_key(
            (f.sha256 for f in bundle.manifest.components["unet"].files.values()),
            batch_size=PROFILE.batch_size,
            precision="fp32",
            backend="tensorrt-rtx",
            version="1.7",
            target=target,
            flags={},
        ),
    )


def _certificate(figure: float, *, reference: str = "numpy") -> CertificateEntry:
    return CertificateEntry(
        component="unet",
        backend="tensorrt-rtx",
        precision="fp32",
        reference=reference,
        metric="relative_l2",
        figure=figure,
        tolerance=1e-4,
        measured_at="2026-11-20T00:00:00Z",
    )


def test_a_portable_engine_of_a_newer_version_replaces_the_older(tiny_bundle: Bundle) -> None:
    old = tiny_bundle.manifest.engines
    newer = replace(old[1], version="2")
    made = add_engines(tiny_bundle.path, tiny_bundle.path, engines=[newer])
    assert made.engines == (old[0], newer)


def test_add_engine_then_replace_it(tiny_bundle: Bundle, tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    first = _built(staging, tiny_bundle, content=b"first")
    add_engines(tiny_bundle.path, staging, engines=[first], certificate=[_certificate(1e-6)])
    bundle = open_bundle(tiny_bundle.path)
    bundle.verify()
    assert bundle.manifest.engines == (*tiny_bundle.manifest.engines, first)
    assert bundle.verified_engine(first).read_bytes() == b"first"

    second = _built(staging, tiny_bundle, content=b"second")
    manifest = add_engines(
        tiny_bundle.path, staging, engines=[second], certificate=[_certificate(2e-6)]
    )
    bundle = open_bundle(tiny_bundle.path)
    bundle.verify()
    assert bundle.manifest == manifest
    assert bundle.manifest.engines == (*tiny_bundle.manifest.engines, second)
    assert [entry.figure for entry in bundle.manifest.certificate] == [2e-6]
    assert _files(tiny_bundle.path) == {
        "bundle.json",
        "tokenizer/tokenizer.json",
        "unet/model.onnx",
        "unet/model.onnx_data",
        second.file,
    }


def test_a_figure_against_another_reference_is_kept(tiny_bundle: Bundle, tmp_path: Path) -> None:
    staging, rows = tmp_path / "staging", (_certificate(1e-6, reference="diffusers"),)
    engine = _built(staging, tiny_bundle, content=b"plan")
    add_engines(tiny_bundle.path, staging, engines=[engine], certificate=rows)
    rows = (*rows, _certificate(0.0, reference="the bundle's ONNX"))
    engine = _built(staging, tiny_bundle, content=b"plan")
    manifest = add_engines(tiny_bundle.path, staging, engines=[engine], certificate=rows[1:])
    assert manifest.certificate == rows


def test_replaced_engine_leaves_no_file(tiny_bundle: Bundle, tmp_path: Path) -> None:
    first = _built(tmp_path / "staging", tiny_bundle, content=b"first")
    add_engines(tiny_bundle.path, tmp_path / "staging", engines=[first])
    moved = replace(first, file="engines/elsewhere/unet.engine")
    (tmp_path / "staging" / moved.file).parent.mkdir(parents=True)
    (tmp_path / "staging" / moved.file).write_bytes(b"first")
    add_engines(tiny_bundle.path, tmp_path / "staging", engines=[moved])
    open_bundle(tiny_bundle.path).verify()
    assert not (tiny_bundle.path / first.file).exists()
    assert not (tiny_bundle.path / first.file).parent.exists()


def test_add_what_was_not_built(tiny_bundle: Bundle, tmp_path: Path) -> None:
    entry = _built(tmp_path / "staging", tiny_bundle, content=b"plan")
    (tmp_path / "staging" / entry.file).unlink()
    with pytest.raises(BundleError, match="is missing"):
        add_engines(tiny_bundle.path, tmp_path / "staging", engines=[entry])
    assert open_bundle(tiny_bundle.path) == tiny_bundle


def test_two_builds_at_a_time(tiny_bundle: Bundle, tmp_path: Path) -> None:
    targets = [f"sm{number}" for number in range(80, 92)]
    threads = []
    for target in targets:
        staging = tmp_path / f"staging-{target}"
        entry = _built(staging, tiny_bundle, content=target.encode(), target=target)
        threads.append(
            Thread(target=lambda s=staging, e=entry: add_engines(tiny_bundle.path, s, engines=[e]))
        )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bundle = open_bundle(tiny_bundle.path)
    bundle.verify()
    assert {e.target for e in bundle.manifest.engines} == {"cpu", *targets}
