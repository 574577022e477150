"""The options of a request, the same for every command that sends some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

_KINDS: dict[str, tuple[Any, str]] = {
    "num_inference_steps": (int, ""),
    "guidance_scale": (float, ""),
    "guidance_start": (float, "Share of the steps it begins after."),
    "guidance_stop": (float, "Share of the steps it ends after."),
    "scheduler": (str, "Any name of sd-run; default: the checkpoint's own."),
    "backend": (str, "Of the bundle."),
    "threads": (click.IntRange(min=1), "For backends on the CPU."),
}
DEFAULTS = {
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
    "scheduler": None,
    "backend": "auto",
    "threads": None,
}


def request_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that adds sd-run's options; ``defaults`` are those that differ from its own."""
    chosen = {**DEFAULTS, **defaults}
    options = [
        click.option(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=chosen[name],
            show_default=chosen[name] is not None,
            help=words,
        )
        for name, (kind, words) in _KINDS.items()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
