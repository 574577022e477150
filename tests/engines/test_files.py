"""A listed file is a real one of its size, whatever its name is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sd_engines.errors import BundleError
from sd_engines.files import check_file

if TYPE_CHECKING:
    from pathlib import Path


def test_a_name_too_long_for_the_disk_is_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is missing"):
        check_file(tmp_path, "é" * 200, 1)
