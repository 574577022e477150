"""Whether a bundle's own schedulers can be drawn with, as its export proved that they can."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_engines.bundle import open_bundle
from sd_engines.errors import ConfigError
from sd_engines.node import wrong
from sd_runtime.scheduler_config import pipeline_scheduler_config
from sd_runtime.table import compile_table
from sd_runtime.upscaling import low_res_level

if TYPE_CHECKING:
    import os

    from sd_engines.bundle import Bundle
    from sd_engines.manifest import Manifest


def drawable_bundle(path: str | os.PathLike[str]) -> Bundle:
    """The bundle at ``path``, which is all that `open_bundle` checks, and has schedulers to use."""
    bundle = open_bundle(path)
    check_schedulers(bundle.manifest)
    return bundle


def check_schedulers(manifest: Manifest) -> None:
    """`BundleError` where a configuration in `bundle.json` is of no sampler that there is.

    A request that says nothing finds its table compiled.
    """
    model, field = manifest.model, "scheduler"
    config = pipeline_scheduler_config(model.scheduler, family=model.family)
    try:
        compile_table(config, num_inference_steps=model.defaults.num_inference_steps)
        if model.low_res_scheduler is not None:
            field = "low_res_scheduler"
            low_res_level(model.low_res_scheduler, model.max_noise_level or 0)
    except ConfigError as error:
        raise wrong(f"model.{field}", error.message) from error
