"""Run a bundle that `sd-export` made: prompts in, pictures out, no torch.

    from sd_runtime import Pipeline, Request

    with Pipeline.load("bundle") as pipeline:
        result = pipeline.generate(Request(prompt="a red circle", seed=7))
        result.save("circle.png")

The names below are loaded on first use, so ``import sd_runtime`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd_runtime.pipeline import Pipeline
    from sd_runtime.recipe import Recipe
    from sd_runtime.request import Request
    from sd_runtime.result import Result, Step

__all__ = ["Pipeline", "Recipe", "Request", "Result", "Step"]

_HOMES = {
    "Pipeline": "pipeline",
    "Recipe": "recipe",
    "Request": "request",
    "Result": "result",
    "Step": "result",
}


if not TYPE_CHECKING:  # or to its readers any name would be one

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
