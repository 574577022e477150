"""Whether pictures and their recipes will have room in their files, before they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_runtime.image import check_room
from sd_runtime.recipe import recipe_of, text_from_recipes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_engines.manifest import Manifest
    from sd_runtime.lora import Lora
    from sd_runtime.plan import Plan
    from sd_runtime.recipe import Recipe


def check_files(plan: Plan, manifest: Manifest, format_: str, *, loras: Sequence[Lora]) -> None:
    """`ConfigError` where a file of ``format_`` has no room for a picture of ``plan``, one a file.

    As `encode_image` finds too, once it is drawn. The plan's request is seeded.
    """
    if format_ != "JPEG":  # others hold recipes of any length
        check_room(f"a {format_} file", format_, plan.size)
        return
    for recipe in longest_recipes(plan, manifest, loras=loras):
        text = text_from_recipes([recipe], columns=1)
        check_room("a JPEG file", format_, plan.size, parameters=recipe.parameters(), recipe=text)


def longest_recipes(
    plan: Plan, manifest: Manifest, *, loras: Sequence[Lora], refiner: Manifest | None = None
) -> list[Recipe]:
    """As long as those of its pictures will be at most: which engine will draw is open still."""
    unets = [engine for engine in manifest.engines if engine.component == "unet"]
    return [
        recipe_of(
            image,
            plan,
            manifest,
            backend=max((engine.backend for engine in unets), key=len),
            precision=max((engine.precision for engine in unets), key=len),
            loras=loras,
            refiner=refiner,
        )
        for image in plan.request.images()
    ]
