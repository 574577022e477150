"""What a command line asks for, from whichever source it names: requests, and how to run them."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ConfigError
from sd_runtime.image import read_recipe_text
from sd_runtime.prompts import (
    prompts_from_text,
    request_options,
    requests_from_jsonl,
    seed_requests,
)
from sd_runtime.recipe import recipes_from_text
from sd_runtime.request import Request
from sd_runtime.request_pictures import PICTURES, digest_of
from sd_runtime.task import reads_image

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from sd_engines.manifest import Manifest
    from sd_engines.spec import Precision
    from sd_runtime.lora import Lora
    from sd_runtime.recipe import Recipe
    from sd_runtime.request_pictures import Taken

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The command line, parsed. ``options`` are those of `Request` that were given."""

    bundle: Path
    prompts: tuple[str, ...]
    prompts_file: Path | None
    from_image: Path | None
    refiner: Path | None
    options: Mapping[str, Any]
    output: str
    grid: bool
    save_latents: Path | None
    backend: str | None
    precision: Precision | None
    threads: int | None
    loras: tuple[Lora, ...]


@dataclass(frozen=True)
class Order:
    """The requests of a job, seeds filled in; ``columns`` of a grid, None for single files."""

    requests: tuple[Request, ...]
    columns: int | None
    backend: str
    precision: Precision | None

    @property
    def seeds(self) -> list[int]:
        """The seed of every picture."""
        return [image.seed for request in self.requests for image in request.images()]


def order_of(job: Job, manifest: Manifest, *, refiner: Manifest | None) -> Order:
    """The requests of ``job`` to the bundle of ``manifest``, and perhaps to that of a ``refiner``.

    Warns where a picture to repeat was drawn by something else. Raises `ConfigError` where it names
    no source or several, and as its source is read.
    """
    options = request_options(job.options)
    columns, backend, precision = None, job.backend or "auto", job.precision
    if job.prompts_file is None and job.from_image is None and reads_image(manifest):
        job = replace(job, prompts=job.prompts or ("",))
    given = [bool(job.prompts), job.prompts_file is not None, job.from_image is not None]
    if sum(given) != 1:
        raise ConfigError(
            "no prompt" if not any(given) else "prompts from more than one source",
            'Give a prompt ("a red circle"), or --prompts-file, or --from-image.',
        )
    if job.from_image is not None:
        recipes, columns = recipes_from_text(read_recipe_text(job.from_image))
        inputs = {name: options.pop(name, None) for name in PICTURES}
        requests = [
            replace(recipe.request(**_inputs_of(recipe, recipes, inputs)), **options)
            for recipe in recipes
        ]
        _warn_of_differences(job, recipes, inputs, manifest, refiner)
        if "seed" in job.options:
            requests = [replace(request, seed=None) for request in requests]
        columns = columns if len(recipes) > 1 else None
        backend, precision = _engine_of(recipes[0], job, manifest)
    elif job.prompts_file is not None and job.prompts_file.suffix == ".jsonl":
        requests = requests_from_jsonl(job.prompts_file, options)
    else:
        prompts: Sequence[str] = job.prompts
        if job.prompts_file is not None:
            prompts = prompts_from_text(job.prompts_file)
        # Requests no larger than the engine's batch: what is finished is written at once.
        num_images = max(1, options.get("num_images_per_prompt", 1))
        size = max(1, manifest.profile.batch_size // num_images)
        requests = [
            Request(tuple(prompts[first : first + size]), **options)
            for first in range(0, len(prompts), size)
        ]
    requests = seed_requests(requests, job.options.get("seed"))
    if job.grid and columns is None:
        columns = math.ceil(math.sqrt(sum(request.num_images for request in requests)))
    return Order(tuple(requests), columns, backend, precision)


def _engine_of(recipe: Recipe, job: Job, manifest: Manifest) -> tuple[str, Precision | None]:
    """Backend and precision of the UNet that drew ``recipe``, as far as the bundle has them.

    What ``job`` names comes first.
    """
    unets = [engine for engine in manifest.engines if engine.component == "unet"]
    backend, precision = job.backend or "auto", job.precision
    if job.backend is None and recipe.backend in {engine.backend for engine in unets}:
        backend = recipe.backend
    for engine in unets:
        if (engine.backend, engine.precision) == (backend, recipe.precision):
            precision = precision or engine.precision
    return backend, precision


def _warn_of_differences(
    job: Job,
    recipes: Sequence[Recipe],
    inputs: Mapping[str, Taken | None],
    manifest: Manifest,
    refiner: Manifest | None,
) -> None:
    """Say by what ``recipes`` were drawn that is not what ``job`` draws them by."""
    first, differences = recipes[0], []
    if {recipe.fingerprint for recipe in recipes} - _fingerprints(manifest):
        differences.append(f"drawn with another bundle ({first.model})")
    if any(recipe.loras != tuple(map(str, job.loras)) for recipe in recipes):
        names = ", ".join(first.loras)
        differences.append(
            f"drawn with other LoRAs ({names}), which --lora FILE=SCALE puts on"
            if names
            else "drawn with other LoRAs (none)"
        )
    refiners = {recipe.refiner_fingerprint for recipe in recipes} - {None}
    if refiner is not None and refiners - _fingerprints(refiner):
        differences.append(f"refined with another bundle ({first.refiner})")
    for name, picture in inputs.items():
        digests = {getattr(recipe, name) for recipe in recipes} - {None}
        if picture is not None and digests - {digest_of(picture)}:
            differences.append(f"made from another {name} than {_name(picture)}")
    for difference in differences:
        logger.warning("%s was %s: expect another picture", job.from_image, difference)


def _fingerprints(manifest: Manifest) -> set[str]:
    """Those of all the bundle's sizes."""
    profiles = [size.profile for size in manifest.all_sizes]
    return {manifest.at(profile.height, profile.width).fingerprint for profile in profiles}


def _name(taken: Taken) -> str:
    if isinstance(taken, tuple):
        return ", ".join(picture.name for picture in taken)
    return taken.name


def _inputs_of(
    recipe: Recipe, recipes: Sequence[Recipe], inputs: Mapping[str, Taken | None]
) -> dict[str, Taken | None]:
    """A picture goes to the recipes that were made from one; to all where none was."""
    return {
        name: picture
        for name, picture in inputs.items()
        if getattr(recipe, name) or not any(getattr(other, name) for other in recipes)
    }
