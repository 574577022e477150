"""What `sd-bench peers` found: one row a peer, as JSON and as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from sd_bench.peers.ratio import Ratio, paired_ratio
from sd_bench.text_table import aligned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from sd_bench.measurement import Settings

FORMAT: Final = "sd-bench peers"
FORMAT_VERSION: Final = 1


@dataclass(frozen=True)
class Likeness:
    """One peer's picture beside another's."""

    pixels_within_1: float
    """Share of the picture's values that differ by at most 1 of 255."""
    latents_error: float | None
    """Relative L2 of the final latents; None where one of them does not show them."""


@dataclass(kw_only=True)
class Row:
    """One peer. What was not measured is None or empty."""

    name: str
    precision: str
    state: Literal["measured", "not installed", "failed"] = "measured"
    error: str | None = None
    """Why it is not measured."""
    hint: str | None = None
    """What to do about it."""
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    prepare_s: float | None = None
    """Converting, exporting or compiling ahead of time, once per checkpoint."""
    cold_start_ms: list[float] = field(default_factory=list)
    """From the start of the process to the picture on disk."""
    load_ms: list[float] = field(default_factory=list)
    """The part of a cold start that imports and loads."""
    warm_ms: list[float] = field(default_factory=list)
    """Per round: from the prompt to pixels in memory."""
    peak_memory_bytes: int | None = None
    own_memory_bytes: int | None = None
    """After a picture, without files mapped into memory: those the kernel takes back at need."""
    ratio: Ratio | None = None
    """Warm, to ours of the same round."""
    likeness_to_ours: Likeness | None = None
    likeness_to_reference: Likeness | None = None
    captions: int = 0
    """How many held-out captions of the shipped checkpoint it drew."""
    captions_obeyed: int = 0
    """In how many of them `checker.faults` finds nothing wrong."""

    def add_memory(self, drawn: Mapping[str, Any]) -> None:
        """Note what a worker's answer says that it held, if it is more than was known."""
        self.peak_memory_bytes = max(self.peak_memory_bytes or 0, drawn["peak_memory_bytes"] or 0)
        self.own_memory_bytes = max(self.own_memory_bytes or 0, drawn["own_memory_bytes"] or 0)

    def fail(self, error: str, hint: str, *, state: Literal["not installed", "failed"]) -> None:
        """Note why there are no figures."""
        self.state, self.error, self.hint = state, error, hint


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows, ours first. ``reference`` names the row whose picture counts as right."""

    bundle: str
    fingerprint: str
    model: str
    settings: Settings
    threads: int
    environment: Mapping[str, str]
    measured_at: str
    reference: str
    rows: list[Row]

    def to_json(self) -> str:
        """The whole comparison as one JSON object."""
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    def table(self) -> str:
        """For a terminal; what was not measured is listed below it, with what to do."""
        head = (
            *("", "precision", "warm, ms", "÷ ours (95 %)", "cold start, s", "RAM, MB (own)"),
            *("prepare, s", "like ours", f"like {self.reference}", "latents", "obeys"),
        )
        lines = [head, *(_cells(row) for row in self.rows if row.state == "measured")]
        text = aligned(lines, words=2)
        unmeasured = [row for row in self.rows if row.state != "measured"]
        text += [f"{row.name}: {row.state}: {row.error}\n  {row.hint}" for row in unmeasured]
        return "\n".join(text)


def judge(
    rows: list[Row],
    pictures: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.float32] | None]],
    *,
    reference: str,
) -> None:
    """Fill in ratios to the first row, and likenesses to it and to ``reference``.

    ``pictures`` holds uint8 [height, width, 3] and, where shown, latents by the row's name.
    """
    ours = rows[0]
    for row in rows:
        if row.state != "measured":
            continue
        if row.warm_ms:
            row.ratio = paired_ratio(row.warm_ms, ours.warm_ms)
        if row.name in pictures:
            row.likeness_to_ours = likeness(pictures[row.name], pictures[ours.name])
            if reference in pictures:
                row.likeness_to_reference = likeness(pictures[row.name], pictures[reference])


def likeness(
    found: tuple[NDArray[np.uint8], NDArray[np.float32] | None],
    wanted: tuple[NDArray[np.uint8], NDArray[np.float32] | None],
) -> Likeness:
    """Pixels and latents of one drawing beside another's; 0 for pictures of different sizes."""
    from sd_export.verify import pixels_within_1, relative_l2

    error = None
    if found[1] is not None and wanted[1] is not None and found[1].shape == wanted[1].shape:
        error = relative_l2(found[1], wanted[1])
        error = error if np.isfinite(error) else None
    if found[0].shape != wanted[0].shape:
        return Likeness(0.0, error)
    return Likeness(pixels_within_1(found[0], wanted[0]), error)


def _cells(row: Row) -> tuple[str, ...]:
    ours, right = row.likeness_to_ours, row.likeness_to_reference
    return (
        row.name,
        row.precision,
        f"{median(row.warm_ms):.1f}" if row.warm_ms else "–",
        _ratio(row.ratio),
        f"{median(row.cold_start_ms) / 1e3:.2f}" if row.cold_start_ms else "–",
        _memory(row),
        f"{row.prepare_s:.1f}" if row.prepare_s is not None else "–",
        f"{ours.pixels_within_1:.2%}" if ours else "–",
        f"{right.pixels_within_1:.2%}" if right else "–",
        f"{right.latents_error:.1e}" if right and right.latents_error is not None else "–",
        f"{row.captions_obeyed / row.captions:.1%}" if row.captions else "–",
    )


def _memory(row: Row) -> str:
    if not row.peak_memory_bytes:
        return "–"
    own = f" ({row.own_memory_bytes / 1e6:.0f})" if row.own_memory_bytes else ""
    return f"{row.peak_memory_bytes / 1e6:.0f}{own}"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    interval = "–" if ratio.low is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
    return f"{ratio.median:.2f} ({interval})"
