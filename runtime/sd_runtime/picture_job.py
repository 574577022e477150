"""The pictures that a file of jobs asks for: each is one file, whose name says what is in it.

Whoever draws one, however often a run is killed, writes that very file, whole; so what is left to
do is what is not there yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from sd_engines.errors import BackendError, ConfigError
from sd_runtime.batch import join_requests, settings_of
from sd_runtime.command import raise_received_signal
from sd_runtime.files import write_files
from sd_runtime.image import read_recipe_text
from sd_runtime.plan import plan
from sd_runtime.recipe import recipe_of, recipes_from_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sd_engines.manifest import Manifest
    from sd_runtime.lora import Lora
    from sd_runtime.pipeline import Pipeline
    from sd_runtime.request import Request

PictureBatch = tuple["PictureJob", ...]
"""What one call of the engines draws: pictures of the same settings."""


@dataclass(frozen=True)
class PictureJob:
    """One picture: its seeded ``request``, and the ``name`` of its file.

    The name is ``LINE-NUMBER-DIGEST.png``: the line of the file of jobs, from 1 and not counting
    blank ones; which of that line's pictures, from 0; and the start of `Recipe.digest`.
    """

    name: str
    request: Request
    digest: str

    def is_in(self, folder: Path) -> bool:
        """Whether ``folder`` has the picture: whole, and by its own word drawn from this recipe."""
        path = folder / self.name
        if not path.is_file():
            return False
        try:
            recipes, _ = recipes_from_text(read_recipe_text(path))
        except ConfigError:
            return False
        return [recipe.digest for recipe in recipes] == [self.digest]


@dataclass(frozen=True)
class Drawn:
    """What became of one picture. ``flagged`` is the safety checker's word; None where unknown."""

    name: str
    flagged: bool | None


def picture_jobs(
    requests: Sequence[Request], manifest: Manifest, *, loras: Sequence[Lora]
) -> list[PictureJob]:
    """The pictures of ``requests``, which are seeded, in their order, drawn with ``loras``.

    Raises as `plan` for a request that the bundle cannot do, and names its line.
    """
    jobs = []
    for line, request in enumerate(requests, start=1):
        try:
            planned = plan(request, manifest)
        except ConfigError as error:
            raise ConfigError(f"job {line}: {error.message}", error.hint) from error
        sized = manifest.at(planned.profile.height, planned.profile.width)
        for number, image in enumerate(planned.request.images()):
            recipe = recipe_of(image, planned, sized, backend="", precision="", loras=loras)
            digest = recipe.digest
            single = replace(
                planned.request,
                prompt=image.prompt,
                negative_prompt=image.negative_prompt,
                seed=image.seed,
                num_images_per_prompt=1,
            )
            jobs.append(PictureJob(f"{line:06}-{number}-{digest[:16]}.png", single, digest))
    return jobs


def batches_of(jobs: Sequence[PictureJob], size: int) -> list[PictureBatch]:
    """``jobs`` in their order; neighbours of the same settings together, ``size`` at most."""
    batches = []
    for _, group in groupby(jobs, key=lambda job: settings_of(job.request)):
        alike = tuple(group)
        batches += [alike[first : first + size] for first in range(0, len(alike), size)]
    return batches


def request_of(batch: PictureBatch) -> Request:
    """One request for all pictures of ``batch``."""
    return join_requests([job.request for job in batch])


def draw_batch(pipeline: Pipeline, batch: PictureBatch, folder: Path) -> list[Drawn]:
    """Draw ``batch`` and write its files into ``folder``, each whole or not at all.

    Raises as `Pipeline.generate`, and names the first file of the batch.
    """
    try:
        for step in pipeline.stream(request_of(batch)):
            raise_received_signal()
            result = step.result
    except BackendError as error:
        raise BackendError(f"{batch[0].name}: {error.message}", error.hint) from error
    if result is None:
        raise AssertionError("the last step holds the result")
    for index, job in enumerate(batch):
        write_files(result.files(index, folder / job.name))
    flags = result.nsfw_content_detected or [None] * len(batch)
    return [Drawn(job.name, flag) for job, flag in zip(batch, flags, strict=True)]
