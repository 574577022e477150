"""One run of ``sd-run --jobs``: a file of requests in, a folder of pictures out, resumable."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from sd_runtime.command import fresh_line, progress_bar
from sd_runtime.files import claimed_folder
from sd_runtime.picture_job import batches_of, draw_batch, picture_jobs, request_of
from sd_runtime.pipeline import Pipeline
from sd_runtime.prompts import request_options, requests_from_file, seed_requests
from sd_runtime.scheduler_check import drawable_bundle
from sd_runtime.timing import clock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from sd_engines.bundle import Bundle
    from sd_engines.spec import Precision
    from sd_runtime.lora import Lora
    from sd_runtime.picture_job import Drawn, PictureBatch, PictureJob

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FolderJob:
    """The command line, parsed. ``options`` are those of `Request` that were given.

    ``resume`` leaves what is in the folder already; otherwise every picture is drawn. With ``ray``
    it always does, and a cluster draws, with so many ``workers``.
    """

    bundle: Path
    jobs_file: Path
    options: Mapping[str, Any]
    folder: Path
    resume: bool
    ray: bool
    workers: int | None
    backend: str | None
    precision: Precision | None
    threads: int | None
    loras: tuple[Lora, ...]


def draw_folder(job: FolderJob, *, as_json: bool, quiet: bool) -> None:
    """Draw what ``job`` asks for and print the paths as they are written, or one JSON object.

    Seeds count up from 0 where nothing else is said, so that two runs ask for the same pictures.
    Every option is checked before an engine is opened. Raises `SdError` and its kin; what was
    written by then stays, and ``--resume`` goes on from it.
    """
    start, stdout = clock(), sys.stdout  # which is Ray's to write to while it runs
    bundle = drawable_bundle(job.bundle)
    manifest = bundle.manifest
    requests = requests_from_file(job.jobs_file, request_options(job.options))
    requests = seed_requests(requests, job.options.get("seed", 0))
    pictures = picture_jobs(requests, manifest, loras=job.loras)
    drawn: dict[str, Drawn] = {}
    with claimed_folder(job.folder):
        resume = job.resume or job.ray
        left = [p for p in pictures if not (resume and p.is_in(job.folder))]
        batches = batches_of(left, manifest.profile.batch_size)
        bar_or_none = nullcontext() if quiet else progress_bar(len(left), "Pictures")
        with bar_or_none as bar:
            draw = _drawn_by_ray if job.ray else partial(_drawn_here, bundle)
            for one in draw(job, batches) if batches else ():
                drawn[one.name] = one
                path = job.folder / one.name
                if one.flagged:
                    logger.warning(
                        "%s: the safety checker found it not safe and painted it black", path
                    )
                if not as_json:
                    click.echo(fresh_line(), nl=False, err=True)
                    click.echo(path, file=stdout)
                if bar is not None:
                    bar.update(1)
    if not quiet:
        kept = len(pictures) - len(drawn)
        click.echo(f"Pictures drawn: {len(drawn)}. There already: {kept}.", err=True)
    if as_json:
        total_ms = round(1e3 * (clock() - start), 3)
        click.echo(json.dumps(_report(job, pictures, drawn, total_ms)))


def _drawn_here(bundle: Bundle, job: FolderJob, batches: Sequence[PictureBatch]) -> Iterator[Drawn]:
    with Pipeline.load(
        bundle,
        backend=job.backend or "auto",
        precision=job.precision,
        threads=job.threads,
        request=request_of(batches[0]),
        loras=job.loras,
    ) as pipeline:
        for batch in batches:
            yield from draw_batch(pipeline, batch, job.folder)


def _drawn_by_ray(job: FolderJob, batches: Sequence[PictureBatch]) -> Iterator[Drawn]:
    from sd_runtime.ray_jobs import RayJob, draw_by_ray

    ray_job = RayJob(
        bundle=job.bundle.resolve(),
        folder=job.folder.resolve(),
        backend=job.backend or "auto",
        precision=job.precision,
        threads=job.threads,
        loras=tuple(replace(lora, path=lora.path.resolve()) for lora in job.loras),
        workers=job.workers,
    )
    return draw_by_ray(ray_job, batches)


def _report(
    job: FolderJob,
    pictures: Sequence[PictureJob],
    drawn: Mapping[str, Drawn],
    total_ms: float,
) -> dict[str, Any]:
    return {
        "bundle": str(job.bundle),
        "images": [
            {
                "file": str(job.folder / picture.name),
                "prompt": picture.request.prompt,
                "negative_prompt": picture.request.negative_prompt,
                "seed": picture.request.seed,
                "drawn": picture.name in drawn,
                "nsfw_content_detected": (
                    drawn[picture.name].flagged if picture.name in drawn else None
                ),
            }
            for picture in pictures
        ],
        "timings_ms": {"total": total_ms},
    }
