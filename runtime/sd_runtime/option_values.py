"""Numbers and texts of a request; each check raises a `ConfigError` that names the option."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real

from sd_engines.errors import ConfigError

MAX_WHOLE = 1_000_000
"""Of what nothing else bounds: steps, pixels a side."""
_MAX_FLOAT = sys.float_info.max
_MAX_SHOWN = 80


def shown(value: object) -> str:
    """``value`` as an error names it: its repr, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def kept(value: object) -> object:
    """``value`` as a request keeps it: a list as a tuple, numpy's numbers as Python's own."""
    if isinstance(value, list | tuple):
        return tuple(map(kept, value))
    if type(value) in (bool, int, float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def check_texts(name: str, value: object, *, optional: bool = False) -> None:
    """``value`` is text, or a tuple of one or more; where ``optional``, some may be None."""
    texts = (value,) if isinstance(value, str) else value
    if optional and isinstance(texts, tuple):
        texts = tuple("" if text is None else text for text in texts)
    if not isinstance(texts, tuple) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{name} is {shown(value)}, not text", "Give a string, or several.")
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


def check_whole(name: str, value: object, low: int, high: int = MAX_WHOLE) -> None:
    """``value`` is a whole number from ``low`` to ``high``."""
    if type(value) is not int or not low <= value <= high:
        bounded = high != MAX_WHOLE or (type(value) is int and value > high)
        reach = f"{low} to {high}" if bounded else f"{low} or more"
        raise ConfigError(f"{name} is {shown(value)}", f"Give a whole number, {reach}.")


def check_real(name: str, value: object, low: float, high: float) -> None:
    """``value`` is a finite number from ``low`` to ``high``."""
    limits = "" if low == -math.inf else f" from {low:g} to {high:g}"
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not max(low, -_MAX_FLOAT) <= value <= min(high, _MAX_FLOAT)
    ):
        raise ConfigError(f"{name} is {shown(value)}", f"Give a finite number{limits}.")


def check_flag(name: str, value: object) -> None:
    """``value`` is a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}", "Give true or false.")
