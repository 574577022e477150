"""What a person sees of an export, on stderr: its stages as they end, and what was measured."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from sd_runtime.command import raise_received_signal

if TYPE_CHECKING:
    from sd_engines.manifest import Manifest
    from sd_export.progress import Progress, StageEvent

_CLEAR_LINE = "\r\x1b[K"


def shown_progress(quiet: bool) -> Progress:
    """Prints a line per stage that ended, and on a terminal the one that runs."""
    terminal = sys.stderr.isatty()

    def show(event: StageEvent) -> None:
        raise_received_signal()
        if quiet:
            return
        name = f"{event.component:<14} {event.stage:<20}"
        if event.state == "started":
            if terminal:
                click.echo(f"{_CLEAR_LINE}{name} …", err=True, nl=False)
            return
        start = _CLEAR_LINE if terminal else ""
        words = "skipped" if event.state == "skipped" else f"{event.seconds:6.1f} s"
        if event.stage == "wait":
            words = "another export to this bundle is running; waiting for it"
        size = size_words(event.bytes) if event.bytes else ""
        click.echo(f"{start}{name} {words:>8}  {size:>9}  {event.detail}".rstrip(), err=True)

    return show


def show_certificate(manifest: Manifest) -> None:
    """Print what was measured of every size."""
    for size in manifest.all_sizes:
        profile = f" of {size.profile.width}x{size.profile.height}" if manifest.sizes else ""
        click.echo(f"Certificate{profile}:", err=True)
        for entry in size.certificate:
            click.echo(
                f"  {entry.component:<14} {entry.backend:<12} {entry.precision:<5} "
                f"{entry.metric} {entry.figure:.3g} (tolerance {entry.tolerance:g}) "
                f"against {entry.reference}",
                err=True,
            )


def size_words(count: float) -> str:
    """Of so many bytes, such as 1.5 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def described(manifest: Manifest) -> dict[str, Any]:
    """What ``--json`` says of a bundle."""
    return {
        "profile": asdict(manifest.profile),
        "engines": [asdict(engine) for engine in manifest.engines],
        "certificate": [asdict(entry) for entry in manifest.certificate],
        "sizes": [asdict(size) for size in manifest.sizes],
    }
