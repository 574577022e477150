"""What a request comes to on a bundle: its own values, and the bundle's where it is silent.

All that can be refused is refused here, from the manifest alone and before an engine is opened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.errors import ConfigError
from sd_engines.spec import (
    LOW_RES_LATENTS,
    NOISE_LEVEL,
    STABLE_DIFFUSION_XL,
    TIME_IDS,
    TIMESTEP_COND,
)
from sd_runtime.conditioning import guidance_scale_embedding, time_ids
from sd_runtime.control_options import NO_CONTROL
from sd_runtime.controlnet import Control, controls_of
from sd_runtime.noise import NoiseStream
from sd_runtime.refiner import HIGH_NOISE_FRAC, sized_refiner
from sd_runtime.safety_options import SAFETY_CONCEPT, SAFETY_STRENGTHS, check_safety_guidance
from sd_runtime.scheduler_config import pipeline_scheduler_config, scheduler_name
from sd_runtime.table import SchedulerTable, compile_table
from sd_runtime.task import (
    LATENT_UPSCALING,
    REFINING,
    Task,
    takes_noise_level,
    task_of,
    unet_inputs,
    upscales,
)
from sd_runtime.upscaling import fitting, noise_level_of, upscaling_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from sd_engines.manifest import Manifest
    from sd_engines.spec import ModelSpec, Profile
    from sd_runtime.conditioning import Texts
    from sd_runtime.request import ImageRequest, Request
    from sd_runtime.safety_options import SafetyConfig
    from sd_runtime.upscaling import Upscaling


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``request`` with nothing left open but its seed, and what follows from it.

    ``profile`` is that of the size that is drawn, which a bundle may have beside others.
    ``unet_inputs`` hold for all pictures, float32 [1, …]: the guidance of a UNet that takes it as
    an input, `TIMESTEP_COND`; such a UNet has no ``guided_rows``. To a UNet of Stable Diffusion XL
    the picture's size, `TIME_IDS`; ``negative_unet_inputs`` take their place beside a negative
    prompt. To an upscaler's the `NOISE_LEVEL`, int64 [1]. ``safety`` is there where the request has
    safety guidance. ``refining`` is what a refiner does after it, ``upscaling`` what an upscaler
    makes larger by tiles. Without ``reads_prompt`` empty text takes the place of every
    prompt.
    """

    request: Request
    profile: Profile
    task: Task
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    table: SchedulerTable
    guided_rows: range
    shallow_rows: frozenset[int]
    unet_inputs: Mapping[str, NDArray[Any]]
    negative_unet_inputs: Mapping[str, NDArray[np.float32]]
    controls: tuple[Control, ...] = ()
    safety: SafetyConfig | None = None
    refining: Plan | None = None
    upscaling: Upscaling | None = None
    reads_prompt: bool = True

    def texts(self, image: ImageRequest) -> Texts:
        """What the UNet reads for a picture: its prompt, and with guidance the negative one.

        Last what it is to be led away from, if anything.
        """
        prompt = image.prompt if self.reads_prompt else ""
        if not self.guided_rows:
            return (prompt,)
        concept = () if self.safety is None else (self.request.safety_concept,)
        return (prompt, image.negative_prompt, *concept)

    def noise(self, image: ImageRequest) -> NoiseStream:
        """The random draws of a picture, or of a tile of it."""
        return NoiseStream(image.seed) if self.upscaling is None else self.upscaling.noise(image)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        own = self.profile.height, self.profile.width
        return own if self.upscaling is None else self.upscaling.size

    @property
    def num_rows(self) -> int:
        """UNet calls for one batch, those of a refiner among them."""
        return self.table.num_rows + (self.refining.num_rows if self.refining else 0)

    @property
    def num_drawn(self) -> int:
        """What the UNet draws: pictures, or all the tiles of those that are made larger."""
        tiles = 1 if self.upscaling is None else len(self.upscaling.tiling.tiles)
        return self.request.num_images * tiles

    def num_steps(self, batch_size: int) -> int:
        """UNet calls in all, ``batch_size`` pictures or tiles at a time."""
        return self.num_rows * -(-self.num_drawn // batch_size)


def plan(request: Request, manifest: Manifest, *, refiner: Manifest | None = None) -> Plan:
    """Check ``request`` against a bundle, and against that of a ``refiner`` where one goes on.

    Raises `ConfigError` for a task, a size, a scheduler, a number of steps, a guidance, a
    cache_interval or a control picture that cannot be done, for options that do not go together,
    and two bundles that do not; `BundleError` where the bundle lacks what the task needs.
    """
    task = task_of(request, manifest)
    if task.by_tiles:
        manifest = fitting(request, manifest)
    else:
        manifest = manifest.at(request.height, request.width)
        request = replace(request, height=manifest.profile.height, width=manifest.profile.width)
    if refiner is None:
        if request.high_noise_frac is not None:
            raise ConfigError(
                f"high_noise_frac is {request.high_noise_frac:g} without a refiner",
                "Give one: --refiner BUNDLE; or leave high_noise_frac out.",
            )
        return _plan(request, manifest, task)
    refiner = sized_refiner(request, manifest, refiner)
    share = HIGH_NOISE_FRAC if request.high_noise_frac is None else float(request.high_noise_frac)
    base = _plan(replace(request, high_noise_frac=share), manifest, task, denoising_end=share)
    second = replace(request, **NO_CONTROL, num_inference_steps=base.num_inference_steps)
    second = replace(second, guidance_scale=base.guidance_scale)
    return replace(base, refining=_plan(second, refiner, REFINING, denoising_start=share))


def _plan(
    request: Request,
    manifest: Manifest,
    task: Task,
    *,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
) -> Plan:
    """What ``request`` comes to on one bundle, from a share of the steps on or up to one."""
    upscaling = upscaling_of(request, manifest) if task.by_tiles else None
    is_upscaler = upscales(manifest)
    if request.cache_interval > 1 and "unet_shallow" not in manifest.components:
        raise ConfigError(
            f"cache_interval is {request.cache_interval}, and the bundle has no shallow UNet",
            "Leave it at 1, or export another bundle: "
            f"sd-export --model {manifest.model.source} --feature-cache --output BUNDLE.",
        )
    model = manifest.model
    steps, scale = request.num_inference_steps, request.guidance_scale
    steps = model.defaults.num_inference_steps if steps is None else steps
    scale = model.defaults.guidance_scale if scale is None else scale
    from_noise = task.reads_image or is_upscaler
    strength = 1.0 if from_noise else request.strength_or(model.defaults)
    request = replace(
        request,
        negative_prompt=_negative_prompt(request, model),
        num_inference_steps=steps,
        guidance_scale=scale,
        strength=None if request.image is None or from_noise else strength,
        noise_level=noise_level_of(request, manifest) if is_upscaler else None,
    )
    safety = None
    if request.safety_guidance is not None:
        safety = SAFETY_STRENGTHS[request.safety_guidance]
        request = replace(request, safety_concept=request.safety_concept or SAFETY_CONCEPT)
    widths = _unet_input_widths(manifest)
    is_distilled = TIMESTEP_COND in widths
    config = pipeline_scheduler_config(model.scheduler, family=model.family)
    if request.mask is not None and model.family != STABLE_DIFFUSION_XL:
        config["skip_prk_steps"] = True  # as diffusers' StableDiffusionInpaintPipeline corrects it
    compiled = partial(
        compile_table,
        config,
        scheduler=request.scheduler,
        num_inference_steps=steps,
        eta=request.eta,
        strength=strength,
        keeps_steps=is_distilled and request.mask is None and not request.control_image,
        denoising_start=denoising_start,
    )
    table = compiled(denoising_end=denoising_end)
    of_rows = table.num_rows if denoising_end is None else compiled().num_rows
    if LOW_RES_LATENTS in widths:  # Karras et al. 2022 (arXiv:2206.00364), table 1
        told = np.log(table.sigma[:-1] / table.alpha[:-1]) / 4
        table = replace(table, timesteps=told)
    if is_distilled:
        _check_distilled(request)
    beside_prompt, beside_negative = _told(request, manifest, guidance_scale=scale)
    guided_rows = range(0) if is_distilled else request.guided_rows(table.num_rows)
    if safety is not None:
        check_safety_guidance(request, is_guided=bool(guided_rows))
    return Plan(
        request=request,
        profile=manifest.profile,
        task=task,
        num_inference_steps=steps,
        guidance_scale=float(scale),
        scheduler=scheduler_name(request.scheduler or config.get("_class_name", "PNDMScheduler")),
        table=table,
        guided_rows=guided_rows,
        shallow_rows=request.shallow_rows(table.num_rows),
        unet_inputs=beside_prompt,
        negative_unet_inputs=beside_negative,
        controls=controls_of(request, manifest, table.num_rows, of_rows=of_rows),
        safety=safety,
        upscaling=upscaling,
        reads_prompt=task is not LATENT_UPSCALING or scale != 0,  # as its pipeline in diffusers
    )


def _negative_prompt(request: Request, model: ModelSpec) -> str | tuple[str | None, ...] | None:
    """That of ``request``; None is empty text, but where the model was trained on zeros."""
    negative = request.negative_prompt
    if model.force_zeros_for_empty_prompt:
        return negative
    if isinstance(negative, tuple):
        return tuple(text or "" for text in negative)
    return negative or ""


def _told(
    request: Request, manifest: Manifest, *, guidance_scale: float
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[np.float32]]]:
    """What the UNet is told besides the texts, and what in its place beside a negative prompt."""
    told: dict[str, NDArray[Any]] = {}
    negative: dict[str, NDArray[np.float32]] = {}
    widths = _unet_input_widths(manifest)
    if TIMESTEP_COND in widths:
        told[TIMESTEP_COND] = guidance_scale_embedding(guidance_scale, widths[TIMESTEP_COND])[None]
    if TIME_IDS in widths:
        is_refiner = manifest.model.requires_aesthetics_score
        ids, negative_ids = time_ids(manifest.profile, is_refiner=is_refiner)
        told[TIME_IDS], negative[TIME_IDS] = ids[None], negative_ids[None]
    if takes_noise_level(manifest):
        told[NOISE_LEVEL] = np.array([request.noise_level])
    return told, negative


def max_prompt_chunks(manifest: Manifest) -> int:
    """How many chunks of the text encoder's length the bundle's UNet reads at once."""
    embeds = unet_inputs(manifest).get("encoder_hidden_states")
    if embeds is None:
        return 1
    tokens = int(embeds.shape[1])
    return max(1, tokens // manifest.model.max_prompt_tokens)


def _unet_input_widths(manifest: Manifest) -> dict[str, int]:
    """The last axis of every input of the UNet."""
    specs = unet_inputs(manifest)
    return {name: int(spec.shape[-1]) for name, spec in specs.items() if len(spec.shape) > 1}


def _check_distilled(request: Request) -> None:
    """Refuse what needs a second, unconditional run of the UNet."""
    if request.negative_prompt and any(request.negative_prompt):
        raise ConfigError(
            "this model was distilled together with its guidance and takes no negative prompt",
            "Leave the negative prompt out; guidance_scale works.",
        )
    if (request.guidance_start, request.guidance_stop) != (0, 1):
        raise ConfigError(
            "this model was distilled together with its guidance, which holds for every step",
            "Leave guidance_start and guidance_stop out; guidance_scale works.",
        )
