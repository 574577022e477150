"""Numbers and texts of a request; each check raises a `ConfigError` that names the option."""

from __future__ import annotations

import math

from sd_engines.errors import ConfigError


def check_texts(name: str, value: object, *, optional: bool = False) -> None:
    """``value`` is text, or a tuple of one or more; where ``optional``, some may be None."""
    texts = (value,) if isinstance(value, str) else value
    if optional and isinstance(texts, tuple):
        texts = tuple("" if text is None else text for text in texts)
    if not isinstance(texts, tuple) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{name} is {value!r}, not text", "Give a string, or several.")
    if not texts:
        raise ConfigError(f"{name} is an empty list", "Give at least one; it may be empty text.")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{name} holds what is no Unicode text, at character {error.start}",
                "Save or type it as UTF-8.",
            ) from error


def check_whole(name: str, value: object, low: int, high: int | None) -> None:
    """``value`` is a whole number from ``low`` to ``high``, where there is one."""
    limits = f"{low} or more" if high is None else f"{low} to {high}"
    if type(value) is not int or value < low or (high is not None and value > high):
        raise ConfigError(f"{name} is {value!r}", f"Give a whole number, {limits}.")


def check_real(name: str, value: object, low: float, high: float) -> None:
    """``value`` is a finite number from ``low`` to ``high``."""
    limits = "" if low == -math.inf else f" from {low:g} to {high:g}"
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise ConfigError(f"{name} is {value!r}", f"Give a finite number{limits}.")
