"""A comparison as one HTML file that needs nothing beside it: no script, no font, no address."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from sd_bench.comparison_figures import comparison_figures
from sd_bench.comparison_report import (
    change_text,
    headline,
    interval_text,
    samples_text,
)
from sd_bench.plots import svg_from_figure

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sd_bench.comparison import Comparison

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
h1 { font-size: 1.4rem; padding: .6rem 1rem; color: #fff; border-radius: .3rem }
h1.PASS { background: #00785a } h1.FAIL { background: #b00020 }
h1.INCONCLUSIVE { background: #8a6100 }
h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem; text-align: right }
td:first-child, th:first-child, table.words td { text-align: left; overflow-wrap: anywhere }
tr { border-bottom: 1px solid #ddd } tr.judged { font-weight: bold }
svg { max-width: 100%; height: auto }
"""


def page(comparison: Comparison) -> str:
    """The file's text. Raises `BackendError` where matplotlib is not installed."""
    verdict, title = comparison.judgement.verdict, escape(headline(comparison))
    what = escape(f"{samples_text(comparison)}; {comparison.base.settings.words}.")
    parts = [
        f'<h1 class="{verdict}">{title}</h1>\n<p>{what}</p>',
        _table(("", "base", "new"), _subjects(comparison), kind="words"),
        *(f"<p>Note: {escape(note)}.</p>" for note in comparison.notes),
        _stages(comparison),
        *(
            f"<h2>{escape(name)}</h2>\n{svg_from_figure(figure)}"
            for name, figure in comparison_figures(comparison).items()
        ),
        "<h2>Environment</h2>",
        _table(("", "base", "new"), _environment(comparison), kind="words"),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _stages(comparison: Comparison) -> str:
    rows = [
        (stage, f"{j.base_ms:.3f}", f"{j.new_ms:.3f}", change_text(j), interval_text(j))
        for stage, j in comparison.stages.items()
    ]
    header = ("median, ms", "base", "new", "change", "interval")
    return _table(header, rows, judged=comparison.judgement.criterion.stage)


def _subjects(comparison: Comparison) -> list[tuple[str, ...]]:
    sides = (comparison.base, comparison.new)
    return [
        ("bundle", *(side.bundle for side in sides)),
        ("fingerprint", *(side.fingerprint[:10] for side in sides)),
        ("backend", *(f"{side.backend} {side.precision}" for side in sides)),
        ("measured", *(side.measured_at for side in sides)),
    ]


def _environment(comparison: Comparison) -> list[tuple[str, ...]]:
    base, new = comparison.base.environment, comparison.new.environment
    return [(name, base.get(name, ""), new.get(name, "")) for name in {**base, **new}]


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", judged: str = ""
) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marked = ' class="judged"' if judged and cells[0] == judged else ""
        inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
        return f"<tr{marked}>{inner}</tr>"

    lines = [line(header, "th"), *(line(row, "td") for row in rows)]
    return f'<table class="{kind}">\n' + "\n".join(lines) + "\n</table>"
