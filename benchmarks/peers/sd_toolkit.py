"""Worker of `sd-bench peers`: this toolkit's own runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol import Drawing, Job, serve

if TYPE_CHECKING:
    from pathlib import Path

    from sd_runtime import Pipeline, Request


class SdToolkit:
    """A bundle, opened by `sd_runtime` as `sd-run` opens it."""

    packages = ("sd-toolkit", "numpy", "onnxruntime", "openvino")

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None

    def prepare(self, job: Job, folder: Path) -> None:
        """Open it once: ``auto`` measures the engines then, and remembers the fastest."""
        self.load(job)

    def load(self, job: Job) -> dict[str, str]:
        """Open the bundle."""
        from sd_runtime import Pipeline

        steps = job.num_inference_steps
        self._pipeline = Pipeline.load(
            job.bundle,
            backend=job.backend,
            threads=job.threads,
            request=_request(job),
            num_steps=None if job.pictures is None else job.pictures * steps,
        )
        return {}

    def generate(self, job: Job, *, with_latents: bool) -> Drawing:
        """Draw; latents come for free."""
        if self._pipeline is None:
            raise RuntimeError("nothing is loaded")
        result = self._pipeline.generate(_request(job))
        recipe = result.recipes[0]
        return Drawing(
            result.pixels[0],
            result.latents if with_latents else None,
            {"backend": recipe.backend, "precision": recipe.precision},
        )


def _request(job: Job) -> Request:
    from sd_runtime import Request

    return Request(
        job.prompt,
        negative_prompt=job.negative_prompt,
        seed=job.seed,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        scheduler=job.scheduler_name,
        height=job.height,
        width=job.width,
    )


if __name__ == "__main__":
    serve(SdToolkit())
