"""Large files are hashed once, until anything about them changes."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from sd_engines import known_file
from sd_engines.bundle import open_bundle
from sd_engines.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines import Bundle

GRAPH = "unet/model.onnx"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The files that are hashed from here on; none is too small or too new to be remembered."""
    from sd_engines import bundle, files

    names: list[str] = []

    def noted(root: Path, asked: dict[str, object]) -> dict[str, object]:
        names.extend(asked)
        return dict(files.hash_files(root, asked))

    monkeypatch.setattr(bundle, "hash_files", noted)
    monkeypatch.setattr(known_file, "_FEWEST_BYTES", 0)
    monkeypatch.setattr(known_file, "_SETTLED_NS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


def test_a_file_is_hashed_once(tiny_bundle: Bundle, hashed: list[str]) -> None:
    """By any name of the bundle; `verify` hashes it all the same."""
    tiny_bundle.verified_path("unet")
    assert GRAPH in hashed
    hashed.clear()
    open_bundle(tiny_bundle.path).verified_path("unet")
    assert hashed == []
    tiny_bundle.verify()
    assert GRAPH in hashed


@pytest.mark.parametrize("change", ["written", "written, and its time set back", "replaced"])
def test_a_changed_file_is_found(tiny_bundle: Bundle, hashed: list[str], change: str) -> None:
    """Its size is the same, and its time of writing may be."""
    tiny_bundle.verified_path("unet")
    time.sleep(0.05)  # some ticks of the file system's clock
    path = tiny_bundle.path / GRAPH
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    if change == "replaced":
        other = path.with_name("other")
        other.write_bytes(content)
        other.replace(path)
    else:
        path.write_bytes(content)
    if change != "written":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match="altered"):
        tiny_bundle.verified_path("unet")
    with pytest.raises(BundleError, match="altered"):  # and is not remembered as it should be
        tiny_bundle.verified_path("unet")


def test_only_settled_and_large_files_are_remembered(
    tiny_bundle: Bundle, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that just changed may change again within one tick of the clock."""
    for limit, value in (("_SETTLED_NS", 3_600_000_000_000), ("_FEWEST_BYTES", 1 << 40)):
        with monkeypatch.context() as patch:
            patch.setattr(known_file, limit, value)
            for _ in range(2):
                hashed.clear()
                tiny_bundle.verified_path("unet")
                assert GRAPH in hashed


def test_a_file_changed_while_it_was_hashed_is_not_remembered(
    tiny_bundle: Bundle, hashed: list[str]
) -> None:
    path = tiny_bundle.path / GRAPH
    state = known_file.file_state(path)
    time.sleep(0.05)
    path.write_bytes(path.read_bytes())
    known_file.remember(state, "0" * 64)
    assert not known_file.is_known(known_file.file_state(path), "0" * 64)


def test_what_is_remembered_may_be_lost_or_damaged(
    tiny_bundle: Bundle, hashed: list[str], tmp_path: Path
) -> None:
    """Then the file is hashed again; one that is gone is an error as ever."""
    tiny_bundle.verified_path("unet")
    for kept in (tmp_path / "cache/sd-toolkit/hashed").iterdir():
        kept.write_bytes(b"\xff")
    hashed.clear()
    tiny_bundle.verified_path("unet")
    assert GRAPH in hashed
    (tiny_bundle.path / GRAPH).unlink()
    with pytest.raises(BundleError, match="is missing"):
        tiny_bundle.verified_path("unet")
