"""The options of a request, the same for every command that sends some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

_KINDS: dict[str, tuple[Any, str]] = {
    "num_inference_steps": (int, "Steps a picture."),
    "guidance_scale": (float, "1 and below: none."),
    "guidance_start": (float, "Share of the steps it begins after."),
    "guidance_stop": (float, "Share of the steps it ends after."),
    "cache_interval": (int, "Steps from one run of the whole UNet to the next."),
    "scheduler": (str, "Any name of sd-run."),
    "height": (int, "In pixels, one that the bundle has."),
    "width": (int, "In pixels."),
    "backend": (str, "Of the bundle."),
    "precision": (str, "The UNet's, of a bundle with several."),
    "threads": (click.IntRange(min=1), "For backends on the CPU."),
}
_UNSET = {
    "scheduler": "the checkpoint's own",
    "height": "the bundle's own",
    "width": "the bundle's own",
    "precision": "not fp8, int8",
    "threads": "every core",
}
_DEFAULTS = {
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
    "cache_interval": 1,
    "scheduler": None,
    "height": None,
    "width": None,
    "backend": "auto",
    "precision": None,
    "threads": None,
}


def prompt_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds what one picture is of, for commands that draw the same one again and again."""
    for option in (
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--negative-prompt", default=""),
        click.option("--prompt", help="[default: one that the shipped checkpoint can draw]"),
    ):
        command = option(command)
    return command


def request_options(
    *, without: Collection[str] = (), optional: bool = False, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that adds sd-run's options; ``defaults`` are those that differ from its own.

    Where they are ``optional``, what is not given is None, and the default is only shown.
    """
    chosen = {**_DEFAULTS, **defaults}
    options = [
        click.option(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=None if optional else chosen[name],
            help=f"{words} [default: {_shown(name, chosen[name])}]",
        )
        for name, (kind, words) in _KINDS.items()
        if name not in without
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _shown(name: str, default: Any) -> Any:
    return _UNSET[name] if default is None else default


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that have a value; the others keep their default."""
    return {name: value for name, value in options.items() if value is not None}
