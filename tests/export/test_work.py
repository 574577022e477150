"""The work folder: what it keeps, and what it says of a disk or a file that fails."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from sd_engines.errors import ExportError
from sd_export.work import work_folder

if TYPE_CHECKING:
    from pathlib import Path


def leave(target: Path, *, more: int) -> None:
    """Do a stage, lay a large file beside it, then ask for ``more`` bytes than are free."""
    with work_folder(target, waiting=lambda: None) as work:
        (work.bundle / "graph").write_bytes(b"done")
        work.finish("graph", "key", files=["bundle/graph"], data={"is": "done"})
        (work.bundle / "large").write_bytes(b"")
        os.truncate(work.bundle / "large", 1 << 40)
        work.check_room(shutil.disk_usage(target.parent).free + more)


def test_no_room_for_the_rest_keeps_what_is_done(tmp_path: Path) -> None:
    """What lies there already needs no room; a file with a hole stands in for large graphs."""
    target = tmp_path / "bundle"
    leave(target, more=1 << 39)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ExportError, match=r"may need \d+\.\d GB more") as caught:
        leave(target, more=1 << 41)
    assert "goes on from what is done" in caught.value.hint
    with work_folder(target, waiting=lambda: None) as work:
        assert work.finished("graph", "key") == {"is": "done"}
    assert not any(tmp_path.iterdir())


def test_a_file_that_cannot_be_read_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    with (
        pytest.raises(ExportError, match=r"cannot read .*/weights: Is a directory") as caught,
        work_folder(tmp_path / "bundle", waiting=lambda: None),
    ):
        (tmp_path / "weights").read_bytes()
    assert caught.value.component == "checkpoint"
    with (
        pytest.raises(ExportError, match="bundle cannot be written: No such file"),
        work_folder(tmp_path / "bundle", waiting=lambda: None) as work,
    ):
        (work.bundle / "deep/graph").write_bytes(b"")
