"""What is asked of a pipeline, checked where it enters so that the loop needs no checks."""

from __future__ import annotations

import secrets
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from sd_engines.errors import ConfigError
from sd_runtime.control_options import CONTROL_NUMBERS, check_control_options
from sd_runtime.option_names import check_names
from sd_runtime.option_values import (
    check_flag,
    check_real,
    check_texts,
    check_whole,
    kept,
    shown,
)
from sd_runtime.picture_options import check_picture_options
from sd_runtime.prompt_weighting import weighted_parts
from sd_runtime.request_pictures import PICTURES, read_pictures
from sd_runtime.safety_options import check_safety_options

if TYPE_CHECKING:
    from sd_engines.spec import Defaults
    from sd_runtime.tiles import Tile

MAX_SEED = 2**64 - 1
MAX_IMAGES = 100_000
"""Pictures a prompt: what is drawn is listed before it is."""
MAX_GUIDANCE_SCALE = 1000.0
"""Far beyond it latents are no numbers any more, on any backend."""


class ImageRequest(NamedTuple):
    """One picture of a request, or a tile of it: what is drawn, what is not, from which seed."""

    prompt: str
    negative_prompt: str | None
    seed: int
    tile: Tile | None = None


@dataclass(frozen=True)
class Request:
    """Everything that decides a result, in diffusers' words.

    None, where it may be, is the bundle's default.

    A ``negative_prompt`` of None is empty text, except to Stable Diffusion XL, which was trained on
    zeros in its place; several may be given, one a prompt.

    Pictures are ordered by prompt, then by number; picture i is drawn from ``seed + i``, or from
    ``seed[i]`` where there is one for each, whatever the batch it runs in.

    ``guidance_scale`` ≤ 1 runs without the unconditional half, and so do the steps before
    ``guidance_start`` and from ``guidance_stop`` on, both shares of all steps (Kynkäänniemi et al.
    2024): half the work there, and another picture. With a ``cache_interval`` of N the whole UNet
    runs on every N-th step, and its shallow part alone on the others, with the deep features of the
    last whole one (DeepCache, Ma et al. 2024): another picture too, where N is not 1. With
    ``prompt_weighting`` brackets in prompts are weights, as `weighted_parts` reads them, and text
    without. ``eta`` is the noise of DDIM and TCD, 0 … 1.

    ``image`` starts all pictures from another one, and a ``mask`` repaints only what is white in
    it: a path, a Pillow picture or uint8 [H, W, 3], an `InputImage` once it is in. ``strength``
    0 … 1 is the share of the steps that run. An upscaler makes it larger instead, with noise of the
    ``noise_level`` on it first, 20 by default: the more, the more freely it is redrawn. A
    ``depth_map`` says how near each part of ``image`` is, to a bundle that would estimate it
    otherwise, or that makes both larger: a path, a Pillow picture or numbers [h, w], a `DepthMap`
    once it is in. Where a bundle draws variations, ``image`` is what is read in the place of a
    prompt, and ``prompt`` is "".

    ``control_image`` is a picture for each ControlNet of the bundle, or one for its only one; each
    counts ``controlnet_conditioning_scale`` times, from ``control_guidance_start`` to
    ``control_guidance_end``, shares of all steps: one number for all, or one for each. In
    ``guess_mode`` the deep layers count most, and only where the prompt is seen.

    ``safety_guidance``, "weak" to "max", leads pictures from text away from ``safety_concept``, of
    which None is `SAFETY_CONCEPT`.

    ``high_noise_frac``, between 0 and 1, is the share that a base model draws before its refiner
    goes on, 0.8 by default.

    Raises `ConfigError` for values that no bundle can do.
    """

    prompt: str | tuple[str, ...]
    _: KW_ONLY
    negative_prompt: str | tuple[str | None, ...] | None = None
    seed: int | tuple[int, ...] | None = None
    num_images_per_prompt: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    cache_interval: int = 1
    prompt_weighting: bool = False
    safety_guidance: str | None = None
    safety_concept: str | None = None
    scheduler: str | None = None
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    image: Any = None
    mask: Any = None
    strength: float | None = None
    depth_map: Any = None
    noise_level: int | None = None
    control_image: Any = None
    controlnet_conditioning_scale: float | tuple[float, ...] = 1.0
    control_guidance_start: float | tuple[float, ...] = 0.0
    control_guidance_end: float | tuple[float, ...] = 1.0
    guess_mode: bool = False
    high_noise_frac: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, kept(getattr(self, field.name)))
        self._check_prompts()
        check_whole("num_images_per_prompt", self.num_images_per_prompt, 1, MAX_IMAGES)
        check_whole("cache_interval", self.cache_interval, 1)
        for name in ("num_inference_steps", "height", "width"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        self._check_seed()
        if self.guidance_scale is not None:
            limit = MAX_GUIDANCE_SCALE
            check_real("guidance_scale", self.guidance_scale, -limit, limit)
        for name in ("guidance_start", "guidance_stop", "eta"):
            check_real(name, getattr(self, name), 0.0, 1.0)
        if self.guidance_start >= self.guidance_stop:
            raise ConfigError(
                f"guidance starts at {self.guidance_start:g} and stops at {self.guidance_stop:g}",
                "Let it start before it stops; a guidance_scale of 1 is none at all.",
            )
        self._check_weights()
        check_safety_options(self)
        self._check_refining()
        self._take_pictures()
        self._take_control_numbers()
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            raise ConfigError(
                f"scheduler is {shown(self.scheduler)}, not a name",
                "Leave it out for the checkpoint's own, or name one, such as 'euler'.",
            )

    def _check_prompts(self) -> None:
        check_texts("prompt", self.prompt)
        if self.negative_prompt is not None:
            check_texts("negative_prompt", self.negative_prompt, optional=True)
        if len(self.negative_prompts) != len(self.prompts):
            raise ConfigError(
                f"{len(self.negative_prompts)} negative prompts for {len(self.prompts)} prompts",
                "Give one negative prompt for all, or as many as there are prompts.",
            )

    def _check_seed(self) -> None:
        if isinstance(self.seed, tuple):
            if len(self.seed) != self.num_images:
                raise ConfigError(
                    f"{len(self.seed)} seeds for {self.num_images} pictures",
                    "Give one seed for the first picture, or as many as there are pictures.",
                )
            for seed in self.seed:
                check_whole("seed", seed, 0, MAX_SEED)
        elif self.seed is not None:
            check_whole("seed", self.seed, 0, MAX_SEED)
            check_whole("seed of the last picture", self.seed + self.num_images - 1, 0, MAX_SEED)

    def _check_weights(self) -> None:
        check_flag("prompt_weighting", self.prompt_weighting)
        if self.prompt_weighting:
            for text in (*self.prompts, *self.negative_prompts):
                weighted_parts(text or "")

    def _check_refining(self) -> None:
        if self.high_noise_frac is not None:
            check_real("high_noise_frac", self.high_noise_frac, 0.0, 1.0)
            if self.high_noise_frac in (0, 1):
                raise ConfigError(
                    f"high_noise_frac is {self.high_noise_frac:g}, and leaves one model nothing",
                    "Give a share between 0 and 1, such as 0.8; or leave the refiner out.",
                )

    def _take_pictures(self) -> None:
        for name in PICTURES:
            object.__setattr__(self, name, read_pictures(name, getattr(self, name)))
        check_picture_options(self)

    def _take_control_numbers(self) -> None:
        for name in CONTROL_NUMBERS:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) == 1:
                object.__setattr__(self, name, value[0])
        check_control_options(self)

    @classmethod
    def from_mapping(cls, options: dict[str, Any]) -> Self:
        """A request from parsed JSON, in which null means the default.

        An unknown key is a `ConfigError` that names what is meant.
        """
        check_names(options, (field.name for field in fields(cls) if field.init))
        given = {name: value for name, value in options.items() if value is not None}
        if "prompt" not in given:
            raise ConfigError("no prompt", 'Give one: {"prompt": "a red circle"}.')
        return cls(**given)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, always as a tuple."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def negative_prompts(self) -> tuple[str | None, ...]:
        """The negative prompts, one for each prompt."""
        given = self.negative_prompt
        return given if isinstance(given, tuple) else (given,) * len(self.prompts)

    @property
    def num_images(self) -> int:
        """Pictures in all."""
        return len(self.prompts) * self.num_images_per_prompt

    def strength_or(self, defaults: Defaults) -> float:
        """The share of the steps that run, 1 where there is no picture to start from."""
        if self.image is None:
            return 1.0
        if self.strength is None:
            return defaults.strength if self.mask is None else defaults.inpainting_strength
        return float(self.strength)

    def guided_rows(self, num_rows: int) -> range:
        """Which of ``num_rows`` UNet calls see the negative prompt as well, as diffusers counts.

        The request must have its ``guidance_scale``. An interval that falls between two of few
        calls holds for none, as there.
        """
        if self.guidance_scale is None:
            raise ValueError("the request has no guidance scale yet")
        if self.guidance_scale <= 1:
            return range(0)
        return range(int(self.guidance_start * num_rows), int(self.guidance_stop * num_rows))

    def shallow_rows(self, num_rows: int) -> frozenset[int]:
        """Which of ``num_rows`` UNet calls run on kept deep features.

        Features are of the batch that made them, and guidance doubles it: so where guidance begins
        or ends the whole UNet runs, and from there on every ``cache_interval``-th time.
        """
        guided = self.guided_rows(num_rows)
        stretches = range(guided.start), guided, range(guided.stop, num_rows)
        whole = {row for rows in stretches for row in rows[:: self.cache_interval]}
        return frozenset(range(num_rows)) - whole

    def seeded(self) -> Self:
        """The same request with a seed: its own, or a random one of 32 bits."""
        if self.seed is not None:
            return self
        return replace(self, seed=secrets.randbelow(2**32 - self.num_images))

    def images(self) -> tuple[ImageRequest, ...]:
        """The pictures one by one. The request must be `seeded`."""
        if self.seed is None:
            raise ValueError("the request has no seed yet")
        seeds = self.seed
        if not isinstance(seeds, tuple):
            seeds = tuple(range(seeds, seeds + self.num_images))
        texts = [
            pair
            for pair in zip(self.prompts, self.negative_prompts, strict=True)
            for _ in range(self.num_images_per_prompt)
        ]
        return tuple(
            ImageRequest(prompt, negative, seed)
            for (prompt, negative), seed in zip(texts, seeds, strict=True)
        )
