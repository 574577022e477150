"""What a server offers of a model: what its bundle can draw, and how much one may ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from sd_engines.errors import ConfigError
from sd_runtime.controlnet import controlnet_names
from sd_runtime.plan import plan
from sd_runtime.scheduler_config import SCHEDULERS
from sd_runtime.task import plainest_request, reads_image, tasks_of

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines.manifest import Manifest
    from sd_runtime.pipeline import Pipeline
    from sd_runtime.request import Request

MAX_PROMPT_CHARS = 4000
"""CLIP reads some 300 of them; a few layers of templates fit."""
MAX_BODY_BYTES = 16 * 2**20
"""A picture of 12 MB in base64."""
MAX_GUIDANCE_SCALE = 100.0
"""Beyond it pictures are noise, or no numbers at all."""
MAX_CONDITIONING_SCALE = 10.0
"""The same of a ControlNet's; clients' own sliders end at 2."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A model behind a server: what it is called, and what a request for it may hold.

    ``height`` and ``width`` are in pixels, and what is drawn where nothing is said of them;
    ``sizes`` are all, each ``WIDTHxHEIGHT``. ``created`` is a Unix time in seconds.
    """

    model: str
    created: int
    fingerprint: str
    backend: str
    precision: str
    tasks: tuple[str, ...]
    height: int
    width: int
    sizes: tuple[str, ...]
    scheduler: str
    schedulers: tuple[str, ...]
    default_steps: int
    default_guidance_scale: float
    controlnets: tuple[str, ...]
    max_images: int
    max_steps: int

    @classmethod
    def from_pipeline(cls, pipeline: Pipeline, *, max_images: int, max_steps: int) -> Self:
        """What ``pipeline`` can draw, without the schedulers that its checkpoint excludes."""
        path, unet = pipeline.bundle.path.resolve(), pipeline.engines["unet"]
        manifest = pipeline.bundle.manifest
        plainest = plainest_request(manifest)
        own = plan(plainest, manifest)
        return cls(
            model=model_name(path),
            created=int((path / "bundle.json").stat().st_mtime),
            fingerprint=pipeline.fingerprint,
            backend=unet.backend,
            precision=unet.precision,
            tasks=tasks_of(manifest),
            height=pipeline.profile.height,
            width=pipeline.profile.width,
            sizes=tuple(f"{s.profile.width}x{s.profile.height}" for s in manifest.all_sizes),
            scheduler=own.scheduler,
            default_steps=min(own.num_inference_steps, max_steps),
            default_guidance_scale=own.guidance_scale,
            controlnets=controlnet_names(manifest),
            schedulers=tuple(
                name for name in sorted(SCHEDULERS) if _fits(name, plainest, manifest)
            ),
            max_images=max_images,
            max_steps=max_steps,
        )

    def check(self, request: Request) -> None:
        """Raise `ConfigError` where ``request`` asks for more than this server gives."""
        for name, value, limit in (
            ("pictures", request.num_images, self.max_images),
            ("steps", request.num_inference_steps or self.default_steps, self.max_steps),
        ):
            if value > limit:
                raise ConfigError(
                    f"{value} {name} in one request",
                    f"Ask for {limit} at most; sd-serve --max-images and --max-steps say so.",
                )

    def check_control_pictures(self, count: int) -> None:
        """Raise `ConfigError` where there is not one for each ControlNet: before any is decoded."""
        wanted = len(self.controlnets)
        if wanted == 0:
            raise ConfigError(
                f"control pictures, and {self.model} has no ControlNet",
                "Leave them out, or draw with a bundle that has: sd-export --controlnet.",
            )
        if count != wanted:
            raise ConfigError(
                f"{count} control pictures for the {wanted} ControlNets of {self.model}: "
                f"{', '.join(self.controlnets)}",
                "Send one for each, in this order; one whose scale is 0 does nothing.",
            )


def model_name(path: Path) -> str:
    """What requests call the bundle in the folder ``path``: the folder's name."""
    return path.resolve().name.removesuffix(".bundle")


def first_request(manifest: Manifest) -> Request:
    """What a server makes its engines ready for; `ConfigError` for a bundle that no door is for."""
    if reads_image(manifest):
        raise ConfigError(
            "the bundle draws variations of a picture, and every door here asks for a prompt",
            "Draw with sd-run BUNDLE --image PICTURE, or in Python.",
        )
    return plainest_request(manifest)


def _fits(scheduler: str, request: Request, manifest: Manifest) -> bool:
    if scheduler.endswith("Scheduler"):
        return False  # the class behind a short name
    try:
        plan(replace(request, scheduler=scheduler), manifest)
    except ConfigError:
        return False
    return True
