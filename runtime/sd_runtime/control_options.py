"""What a request says to ControlNets: a picture for each, and numbers for all or for each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ConfigError
from sd_runtime.option_values import check_flag, check_real

if TYPE_CHECKING:
    from sd_runtime.recipe import Recipe
    from sd_runtime.request import Request

CONTROL_NUMBERS = (
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
)
"""Options of `Request` that are one number, or one for each ControlNet."""
_DEFAULTS = (1.0, 0.0, 1.0)
NO_CONTROL: dict[str, Any] = {
    "control_image": None,
    **dict(zip(CONTROL_NUMBERS, _DEFAULTS, strict=True)),
    "guess_mode": False,
}
"""What a `Request` says that leads by nothing."""


def numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
    """The numbers of one of `CONTROL_NUMBERS`."""
    return value if isinstance(value, tuple) else (value,)


def numbers_each(value: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    """The same, one for each of ``count`` ControlNets."""
    given = numbers(value)
    return given * (count // len(given))


def check_control_options(request: Request | Recipe) -> None:
    """`ConfigError` for numbers that mean nothing, or have no control picture."""
    values = {name: getattr(request, name) for name in CONTROL_NUMBERS}
    check_flag("guess_mode", request.guess_mode)
    for name, value in values.items():
        low, high = (-math.inf, math.inf) if name == CONTROL_NUMBERS[0] else (0.0, 1.0)
        for number in numbers(value):
            check_real(name, number, low, high)
    if request.control_image is None:
        given = [n for n, default in zip(values, _DEFAULTS, strict=True) if values[n] != default]
        given += ["guess_mode"] if request.guess_mode else []
        if given:
            raise ConfigError(
                f"{given[0]} without a control picture",
                "Give one: --control-image PICTURE; or leave it out.",
            )
        return
    count = len(request.control_image)
    for name, value in values.items():
        if len(numbers(value)) not in (1, count):
            raise ConfigError(
                f"{name} has {len(numbers(value))} numbers for {count} control pictures",
                "Give one for all, or one for each.",
            )
    starts, ends = (numbers_each(values[name], count) for name in CONTROL_NUMBERS[1:])
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise ConfigError(
                f"a ControlNet starts at {start:g} and ends at {end:g}",
                "Let it start before it ends; a scale of 0 leaves it out.",
            )
