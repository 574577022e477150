"""The report is one file: it loads nothing, and says what the table says."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from latency_noise import measurement
from sd_bench.comparison import compare
from sd_bench.comparison_figures import BASE, NEW, comparison_figures
from sd_bench.comparison_page import page
from sd_bench.judgement import Criterion

CRITERION = Criterion(allowed_regression=0.05)


class Page(HTMLParser):
    """Collects tags, addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        self.addresses += [value or "" for name, value in attrs if name in names]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_loads_nothing_and_holds_four_figures() -> None:
    text = page(compare(measurement(), measurement(slowdown=1.1), CRITERION))
    found = Page(text)
    assert found.tags.count("svg") == 4
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(found.tags)
    assert all(address.startswith("#") for address in found.addresses)
    assert "@import" not in text
    assert text.count("url(") == text.count("url(#")
    assert '<h1 class="FAIL">FAIL: total +10.0 %' in text
    assert "+5.0 % allowed" in found.text
    assert "two runs apart" in found.text
    assert "unet_step" in found.text


def test_what_a_file_says_is_text_and_never_markup() -> None:
    hostile = replace(measurement(), bundle="<script>alert(1)</script>")
    text = page(compare(hostile, hostile, CRITERION))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_figures_draw_what_was_measured() -> None:
    base, new = measurement(), measurement(slowdown=1.1, seed=1)
    comparison = compare(base, new, CRITERION)
    figures = comparison_figures(comparison)
    ratio, distribution, time, waterfall = (figure.axes[0] for figure in figures.values())

    names = [label.get_text() for label in ratio.get_yticklabels()]
    assert names == list(comparison.stages)
    interval = comparison.judgement.ratio
    drawn = ratio.lines[-2].get_xdata()
    assert drawn == pytest.approx([100 * (interval.low - 1), 100 * (interval.high - 1)])

    assert sum(patch.get_height() for patch in distribution.patches) == 80
    assert [line.get_color() for line in time.lines] == [BASE, NEW]
    assert list(time.lines[1].get_ydata()) == new.stage_ms("total")

    rows = [label.get_text() for label in waterfall.get_yticklabels()]
    assert rows == ["tokenize", "unet 1", "unet 2", "unet 3", "png", "rest"]
    bars = waterfall.containers[1]
    ends = [bar.get_x() + bar.get_width() for bar in bars]
    assert [bar.get_x() for bar in bars][1:] == pytest.approx(ends[:-1])
    assert ends[-1] == pytest.approx(comparison.judgement.new_ms)
