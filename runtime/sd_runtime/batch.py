"""Requests that share a batch: drawn as one, and each gets what it would have got alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sd_runtime.result import Result
from sd_runtime.timing import Timings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sd_runtime.request import Request


def settings_of(request: Request) -> Request:
    """Everything of ``request`` but its texts, seeds and number: equal where two may be joined."""
    return replace(request, prompt="", negative_prompt=None, seed=None, num_images_per_prompt=1)


def join_requests(requests: Sequence[Request]) -> Request:
    """One request for the pictures of all, in their order. They are `seeded` and alike."""
    if len(requests) == 1:
        return requests[0]
    images = [image for request in requests for image in request.images()]
    return replace(
        requests[0],
        prompt=tuple(image.prompt for image in images),
        negative_prompt=tuple(image.negative_prompt for image in images),
        seed=tuple(image.seed for image in images),
        num_images_per_prompt=1,
    )


def split_result(result: Result, requests: Sequence[Request]) -> Iterator[Result]:
    """Each request's own pictures. All have the timings of the batch, each its own copy."""
    first = 0
    for request in requests:
        own = slice(first, first + request.num_images)
        first = own.stop
        flags, depth = result.nsfw_content_detected, result.depth
        timings = Timings()
        timings.merge(result.timings)
        yield Result(
            request=request,
            pixels=result.pixels[own],
            device_pixels=result.device_pixels[own],
            latents=result.latents[own],
            nsfw_content_detected=None if flags is None else flags[own],
            recipes=result.recipes[own],
            timings=timings,
            depth=None if depth is None else depth[own],
        )
