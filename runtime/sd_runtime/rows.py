"""Between a scheduler's config and its table: what to sample, and the rows that do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sd_runtime.linear_form import Form
    from sd_runtime.noise_schedule import Level, NoiseSchedule


@dataclass(frozen=True)
class Run:
    """What is to be sampled: a full scheduler config, and from which step (image-to-image) on."""

    config: Mapping[str, Any]
    schedule: NoiseSchedule
    num_steps: int
    eta: float
    begin: int


@dataclass(frozen=True)
class Rows:
    """The rows of a table before they are laid out: R UNet calls between R + 1 levels.

    ``noised_levels`` are those that diffusers' add_noise brings a picture to before each row; None:
    the rows' own.
    """

    timesteps: Sequence[float]
    levels: Sequence[Level]
    conversion: Callable[[str, Level], tuple[float, float]]
    updates: Sequence[Form]
    draws_noise: Sequence[bool]
    init_noise_scale: float = 1.0
    noised_levels: Sequence[Level] | None = None
