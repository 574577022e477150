"""One run of `sd-run`: everything checked before anything heavy, then drawn and written."""

from __future__ import annotations

import io
import json
import logging
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from sd_engines.errors import ConfigError
from sd_runtime.command import fresh_line, progress_bar, raise_received_signal
from sd_runtime.file_room import longest_recipes
from sd_runtime.files import check_writable, depth_path, output_paths, write_files
from sd_runtime.image import check_room, encode_image, format_of, grid_of
from sd_runtime.order import order_of
from sd_runtime.pipeline import Pipeline
from sd_runtime.plan import plan
from sd_runtime.recipe import text_from_recipes
from sd_runtime.scheduler_check import drawable_bundle
from sd_runtime.task import gives_depth
from sd_runtime.timing import Timings, clock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sd_engines.manifest import Manifest
    from sd_runtime.order import Job, Order
    from sd_runtime.plan import Plan
    from sd_runtime.recipe import Recipe
    from sd_runtime.result import Result

logger = logging.getLogger(__name__)


def draw(job: Job, *, as_json: bool, quiet: bool) -> None:
    """Draw ``job``, write its files and print their paths, or one JSON object.

    Every option is checked before an engine is opened. Raises `SdError` and its kin.
    """
    start = clock()
    bundle = drawable_bundle(job.bundle)
    second = drawable_bundle(job.refiner) if job.refiner else None
    manifest, refiner = bundle.manifest, second.manifest if second else None
    order = order_of(job, manifest, refiner=refiner)
    seeds = order.seeds
    paths = output_paths(job.output, seeds[:1] if order.columns else seeds)
    _check_places(job, paths, manifest)
    plans = [plan(request, manifest, refiner=refiner) for request in order.requests]
    if (order.columns or job.save_latents) and len({planned.size for planned in plans}) > 1:
        raise ConfigError(
            f"{'--grid' if order.columns else '--save-latents'} is for pictures of one size",
            "Leave it out, or ask for one --height and --width.",
        )
    _check_room(job, order, paths, plans, manifest, refiner)
    batch_size = manifest.profile.batch_size
    num_steps = sum(planned.num_steps(batch_size) for planned in plans)
    if "seed" not in job.options and not job.from_image and not quiet:
        click.echo(f"Seed {seeds[0]}", err=True)

    timings, results = Timings(), []
    with timings.measure("load"):
        pipeline = Pipeline.load(
            bundle,
            backend=order.backend,
            threads=job.threads,
            precision=order.precision,
            request=order.requests[0],
            num_steps=num_steps,
            loras=job.loras,
            refiner=second,
        )
    bar_or_none = nullcontext() if quiet else progress_bar(num_steps, "Denoising")
    with pipeline, bar_or_none as bar:
        for request in order.requests:
            for step in pipeline.stream(request):
                raise_received_signal()
                if step.result is not None:
                    results.append(step.result)
                elif bar is not None:
                    bar.update(1)
            if order.columns is None:
                done = sum(len(result.recipes) for result in results)
                files = paths[done - len(results[-1].recipes) : done]
                _write(results[-1], files, echo=not as_json)
                _note_first_picture(timings, start)
                results[-1] = _without_pictures(results[-1])
            if bar is not None:  # the last step, once its words are above the bar
                bar.update(1)
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
    flags = [flag for r in results for flag in r.nsfw_content_detected or [None] * len(r.recipes)]
    for path, flag in zip(paths, flags, strict=True):
        if flag:
            logger.warning("%s: the safety checker found it not safe and painted it black", path)
    if as_json:
        total_ms = round(1e3 * (clock() - start), 3)
        has_depth = gives_depth(manifest)
        report = _report(job, results, paths, flags, timings, total_ms, has_depth=has_depth)
        # The clock is the machine's: whoever started this process can tell how long that took.
        click.echo(json.dumps({**report, "started_s": start}))


def _check_places(job: Job, paths: Sequence[Path], manifest: Manifest) -> None:
    """`ConfigError` where a file could not be written, or would be two things."""
    for path in paths:
        format_of(path)
    pictures = [*paths, *(map(depth_path, paths) if gives_depth(manifest) else ())]
    for path in pictures:
        check_writable(path)
    if job.save_latents:
        check_writable(job.save_latents)
        if job.save_latents.resolve() in {path.resolve() for path in pictures}:
            raise ConfigError(
                f"{job.save_latents} is both --output and --save-latents",
                "Name another file for the latents.",
            )


def _check_room(
    job: Job,
    order: Order,
    paths: Sequence[Path],
    plans: Sequence[Plan],
    manifest: Manifest,
    refiner: Manifest | None,
) -> None:
    """`ConfigError` where a picture or its recipe will have no room in its file."""
    recipes: list[Recipe] = []
    format_ = format_of(paths[0])
    if format_ == "JPEG":
        for planned in plans:
            recipes += longest_recipes(planned, manifest, loras=job.loras, refiner=refiner)
    if order.columns:
        rows, (height, width) = -(-len(order.seeds) // order.columns), plans[0].size
        text = text_from_recipes(recipes, columns=order.columns)
        parameters = recipes[0].parameters() if recipes else ""
        size = rows * height, order.columns * width
        check_room(paths[0].name, format_, size, parameters=parameters, recipe=text)
        return
    sizes = [planned.size for planned in plans for _ in planned.request.images()]
    for index, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        own = recipes[index : index + 1]
        parameters, text = own[0].parameters() if own else "", text_from_recipes(own, columns=1)
        check_room(path.name, format_, size, parameters=parameters, recipe=text)


def _write(result: Result, paths: Sequence[Path], *, echo: bool) -> None:
    contents: dict[Path, bytes] = {}
    for index, path in enumerate(paths):
        contents |= result.files(index, path)
    write_files(contents)
    if echo:
        click.echo(fresh_line(), nl=False, err=True)
        click.echo("\n".join(map(str, paths)))


def _without_pictures(result: Result) -> Result:
    """What is left of ``result`` once they are written: thousands of them would fill a memory."""
    none = np.empty((0, *result.pixels.shape[1:]), np.uint8)
    return replace(result, pixels=none, device_pixels=none, depth=None)


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
    *,
    has_depth: bool,
) -> dict[str, Any]:
    recipes = [recipe for result in results for recipe in result.recipes]
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
