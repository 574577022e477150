"""One run of `sd-run`: what was asked, checked before anything heavy, then drawn and written."""

from __future__ import annotations

import io
import json
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import click
import numpy as np

from sd_engines.bundle import open_bundle
from sd_engines.errors import ConfigError
from sd_runtime.command import progress_bar, raise_received_signal
from sd_runtime.files import check_writable, depth_path, output_paths, write_files
from sd_runtime.image import encode_image, format_of, grid_of, read_recipe_text
from sd_runtime.pipeline import Pipeline
from sd_runtime.plan import plan
from sd_runtime.prompts import (
    prompts_from_text,
    request_options,
    requests_from_jsonl,
    seed_requests,
)
from sd_runtime.recipe import INPUTS, fingerprints, recipes_from_text, text_from_recipes
from sd_runtime.request import Request
from sd_runtime.task import gives_depth, reads_image
from sd_runtime.timing import Timings, clock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from sd_engines.manifest import Manifest
    from sd_engines.spec import Precision
    from sd_runtime.depth_map import DepthMap
    from sd_runtime.input_image import InputImage
    from sd_runtime.lora import Lora
    from sd_runtime.recipe import Recipe
    from sd_runtime.result import Result

logger = logging.getLogger(__name__)
Taken: TypeAlias = "InputImage | DepthMap | tuple[InputImage, ...]"


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


def draw(job: Job, *, as_json: bool, quiet: bool) -> None:
    """Draw ``job``, write its files and print their paths, or one JSON object.

    Every option is checked before an engine is opened. Raises `SdError` and its kin.
    """
    start = clock()
    manifest = open_bundle(job.bundle).manifest
    refiner = open_bundle(job.refiner).manifest if job.refiner else None
    order = _order(job, manifest, refiner)
    seeds = order.seeds
    paths = output_paths(job.output, seeds[:1] if order.columns else seeds)
    for path in paths:
        format_of(path)
        check_writable(path)
        if gives_depth(manifest):
            check_writable(depth_path(path))
    if job.save_latents:
        check_writable(job.save_latents)
    plans = [plan(request, manifest, refiner=refiner) for request in order.requests]
    batch_size = manifest.profile.batch_size
    num_steps = sum(planned.num_steps(batch_size) for planned in plans)
    if "seed" not in job.options and not job.from_image and not quiet:
        click.echo(f"Seed {seeds[0]}", err=True)

    timings, results = Timings(), []
    with timings.measure("load"):
        pipeline = Pipeline.load(
            job.bundle,
            backend=order.backend,
            threads=job.threads,
            precision=order.precision,
            request=order.requests[0],
            loras=job.loras,
            refiner=job.refiner,
        )
    bar_or_none = nullcontext() if quiet else progress_bar(num_steps, "Denoising")
    with pipeline, bar_or_none as bar:
        for request in order.requests:
            for step in pipeline.stream(request):
                raise_received_signal()
                if bar is not None:
                    bar.update(1)
                if step.result is not None:
                    results.append(step.result)
            if order.columns is None:
                done = sum(len(result.pixels) for result in results)
                files = paths[done - len(results[-1].pixels) : done]
                _write(results[-1], files, echo=not as_json)
                _note_first_picture(timings, start)
    if order.columns is not None:
        _write_grid(results, paths[0], columns=order.columns, timings=timings)
        _note_first_picture(timings, start)
        if not as_json:
            click.echo(paths[0])
    if job.save_latents:
        _write_latents(results, job.save_latents)

    for result in results:
        timings.merge(result.timings)
    if order.columns is not None:
        paths *= len(seeds)
    flags = [flag for r in results for flag in r.nsfw_content_detected or [None] * len(r.pixels)]
    for path, flag in zip(paths, flags, strict=True):
        if flag:
            logger.warning("%s: the safety checker found it not safe and painted it black", path)
    if as_json:
        total_ms = round(1e3 * (clock() - start), 3)
        report = _report(job, results, paths, flags, timings, total_ms)
        # The clock is the machine's: whoever started this process can tell how long that took.
        click.echo(json.dumps({**report, "started_s": start}))


def _order(job: Job, manifest: Manifest, refiner: Manifest | None) -> Order:
    """The job's requests, from whichever source it names."""
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
        inputs = {name: options.pop(name, None) for name in INPUTS}
        requests = [
            replace(recipe.request(**_inputs_of(recipe, recipes, inputs)), **options)
            for recipe in recipes
        ]
        if "seed" in job.options:
            requests = [replace(request, seed=None) for request in requests]
        columns = columns if len(recipes) > 1 else None
        drawn_by = recipes[0]
        unets = [engine for engine in manifest.engines if engine.component == "unet"]
        if job.backend is None and drawn_by.backend in {engine.backend for engine in unets}:
            backend = drawn_by.backend
        for engine in unets:
            if (engine.backend, engine.precision) == (backend, drawn_by.precision):
                precision = precision or engine.precision
        if {recipe.fingerprint for recipe in recipes} - fingerprints(manifest):
            logger.warning(
                "%s was drawn with another bundle (%s): expect another picture",
                job.from_image,
                recipes[0].model,
            )
        if any(recipe.loras != tuple(map(str, job.loras)) for recipe in recipes):
            logger.warning(
                "%s was drawn with other LoRAs (%s): expect another picture",
                job.from_image,
                ", ".join(recipes[0].loras) or "none",
            )
        refiners = {recipe.refiner_fingerprint for recipe in recipes} - {None}
        if refiner is not None and refiners - fingerprints(refiner):
            logger.warning(
                "%s was refined with another bundle (%s): expect another picture",
                job.from_image,
                recipes[0].refiner,
            )
        for name, picture in inputs.items():
            digests = {getattr(recipe, name) for recipe in recipes} - {None}
            if picture is not None and digests - {_digest(picture)}:
                logger.warning(
                    "%s was made from another %s than %s: expect another picture",
                    job.from_image,
                    name,
                    _name(picture),
                )
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


def _digest(taken: Taken) -> str | tuple[str, ...]:
    """As a recipe has it."""
    if isinstance(taken, tuple):
        return tuple(picture.sha256 for picture in taken)
    return taken.sha256


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


def _write(result: Result, paths: Sequence[Path], *, echo: bool) -> None:
    contents: dict[Path, bytes] = {}
    for index, path in enumerate(paths):
        contents |= result.files(index, path)
    write_files(contents)
    if echo:
        click.echo("\n".join(map(str, paths)))


def _note_first_picture(timings: Timings, start: float) -> None:
    if "first_picture" not in timings.spans:
        timings.add("first_picture", start, clock())


def _write_grid(results: list[Result], path: Path, *, columns: int, timings: Timings) -> None:
    recipes = [recipe for result in results for recipe in result.recipes]
    format_, recipe = format_of(path), text_from_recipes(recipes, columns=columns)
    contents = {}
    depths = [depth for r in results if r.depth is not None for depth in r.depth]
    if depths:
        depth = grid_of(depths, columns=columns)
        contents[depth_path(path)] = encode_image(depth, "PNG", recipe=recipe)
    pixels = grid_of([image for result in results for image in result.pixels], columns=columns)
    with timings.measure(format_.lower()):
        contents[path] = encode_image(
            pixels, format_, parameters=recipes[0].parameters(), recipe=recipe
        )
    write_files(contents)


def _write_latents(results: list[Result], path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate([result.latents for result in results]))
    write_files({path: buffer.getvalue()})


def _report(
    job: Job,
    results: Sequence[Result],
    paths: Sequence[Path],
    flags: Sequence[bool | None],
    timings: Timings,
    total_ms: float,
) -> dict[str, Any]:
    recipes = [recipe for result in results for recipe in result.recipes]
    has_depth = results[0].depth is not None
    stages = timings.to_json()
    return {
        "bundle": str(job.bundle),
        "backend": recipes[0].backend,
        "precision": recipes[0].precision,
        "images": [
            {
                "file": str(path),
                "depth_file": str(depth_path(path)) if has_depth else None,
                "prompt": recipe.prompt,
                "negative_prompt": recipe.negative_prompt,
                "seed": recipe.seed,
                "nsfw_content_detected": flag,
            }
            for path, recipe, flag in zip(paths, recipes, flags, strict=True)
        ],
        "latents": str(job.save_latents) if job.save_latents else None,
        "timings_ms": {**stages, "generate": stages["total"], "total": total_ms},
    }
