"""Which bundles can be measured: those that draw from text alone, as every instrument asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_engines.errors import ConfigError
from sd_runtime.scheduler_check import drawable_bundle
from sd_runtime.task import TEXT_TO_IMAGE, tasks_of

if TYPE_CHECKING:
    import os

    from sd_engines.bundle import Bundle


def measurable_bundle(path: str | os.PathLike[str]) -> Bundle:
    """`drawable_bundle` of ``path``; `ConfigError` where it begins from a picture."""
    bundle = drawable_bundle(path)
    task = tasks_of(bundle.manifest)[0]
    if task != TEXT_TO_IMAGE.name:
        raise ConfigError(
            f"sd-bench draws from text alone, and {path} is for {task}",
            "Measure the bundle of a checkpoint that begins from text; of this one, "
            "sd-run --json tells the timings.",
        )
    return bundle
