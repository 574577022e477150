"""Figures leave as files and as self-contained elements of a page."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest
from PIL import Image

from sd_bench.plots import COLORS, new_axes, new_figure, save_figure, svg_from_figure
from sd_engines.errors import ConfigError, SdError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


def line() -> Figure:
    figure = new_figure(width=4, height=2)
    new_axes(figure, title="Line", x_label="x", y_label="y").plot([1, 2], [3, 4], color=COLORS[0])
    return figure


def test_an_svg_is_one_element_and_names_no_address_but_namespaces() -> None:
    text = svg_from_figure(line())
    root = ElementTree.fromstring(text)  # noqa: S314 - made two lines above
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for element in root.iter():
        for name, value in element.attrib.items():
            assert "://" not in value, f"{element.tag} {name}"
    assert text == svg_from_figure(line())


def test_files_are_of_their_suffix(tmp_path: Path) -> None:
    save_figure(line(), tmp_path / "line.png")
    with Image.open(tmp_path / "line.png") as image:
        assert image.size == (600, 300)
        assert len(set(image.convert("L").tobytes())) > 10
    save_figure(line(), tmp_path / "line.svg")
    assert "<svg" in (tmp_path / "line.svg").read_text("utf-8")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.bmp"):
        save_figure(line(), tmp_path / "line.bmp")
    with pytest.raises(SdError, match="cannot be written"):
        save_figure(line(), tmp_path / "missing" / "line.png")
