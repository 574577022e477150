"""What the options of a request are called elsewhere, for those who spell them so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_engines.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable

_OTHER_NAMES = {
    "mask_image": "mask",
    "init_image": "image",
    "generator": "seed",
    "num_images": "num_images_per_prompt",
    "steps": "num_inference_steps",
}
"""diffusers' pipelines, `sd-run` and other programs have them; each is nearest to a wrong one."""


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """`ConfigError` for the first of ``given`` that is not ``known``: it names what is meant."""
    names = set(known)
    for name in given:
        if name in names:
            continue
        meant = _OTHER_NAMES.get(name)
        hint = nearest(name, names) if meant is None else f"Here it is {meant!r}."
        raise ConfigError(f"unknown option {name!r}", hint)
