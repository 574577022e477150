"""The recipe of a picture: all that is needed to draw it again, and how it is written down.

A picture file carries it twice: as JSON for `sd-run --from-image`, and as the one text that other
tools of the field show ("Steps: 20, Sampler: ddim, …").
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from sd_engines.errors import ConfigError
from sd_runtime.control_options import CONTROL_NUMBERS, NO_CONTROL, check_control_options
from sd_runtime.infotext import infotext
from sd_runtime.request import Request
from sd_runtime.request_pictures import PICTURES, digest_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sd_engines.manifest import Manifest
    from sd_runtime.lora import Lora
    from sd_runtime.plan import Plan
    from sd_runtime.request import ImageRequest

FORMAT_VERSION = 1
_PROVENANCE = ("backend", "precision", "model", "revision", "refiner")
"""What a recipe says of its bundles beside their fingerprints."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One picture's complete request, and the bundle that drew it.

    ``backend`` and ``precision`` are those of the UNet. ``fingerprint`` is the manifest's.
    ``image`` and ``mask`` are the SHA-256 of what the picture was made from (`InputImage`), which
    the recipe does not hold; ``depth_map`` is that of a given one, and ``control_image`` those of
    what its ControlNets saw. ``strength`` is None where all began as noise.
    ``loras`` were put on the bundle's engines, each its file's SHA-256 and its scale. ``vae`` is
    what took the place of the model's own; None where nothing did. ``refiner`` is the model that
    drew the rest after ``high_noise_frac``; None where none did. ``safety_guidance`` and
    ``safety_concept`` are both None without it. What an upscaler made larger has a ``noise_level``
    in the place of strength.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    eta: float
    height: int
    width: int
    backend: str
    precision: str
    model: str
    revision: str | None
    fingerprint: str
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    cache_interval: int = 1
    prompt_weighting: bool = False
    safety_guidance: str | None = None
    safety_concept: str | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    depth_map: str | None = None
    loras: tuple[str, ...] = ()
    vae: str | None = None
    control_image: tuple[str, ...] | None = None
    controlnet_conditioning_scale: float | tuple[float, ...] = 1.0
    control_guidance_start: float | tuple[float, ...] = 0.0
    control_guidance_end: float | tuple[float, ...] = 1.0
    guess_mode: bool = False
    refiner: str | None = None
    refiner_fingerprint: str | None = None
    high_noise_frac: float | None = None
    noise_level: int | None = None

    def request(
        self,
        *,
        image: object = None,
        mask: object = None,
        depth_map: object = None,
        control_image: object = None,
    ) -> Request:
        """The request that draws this one picture again.

        ``image``, ``mask``, ``depth_map`` and ``control_image`` (one, or a list) are what it was
        made from; `ConfigError` where one is missing.
        """
        given = {
            "image": image,
            "mask": mask,
            "depth_map": depth_map,
            "control_image": control_image,
        }
        for name, picture in given.items():
            digest = getattr(self, name)
            if digest is not None and picture is None:
                digests = digest if isinstance(digest, tuple) else (digest,)
                words = ", ".join(f"{text[:12]}…" for text in digests)
                raise ConfigError(
                    f"the picture was made from another, its {name}, which its recipe does not "
                    f"hold (SHA-256 of the pixels: {words})",
                    "Give it again:" + f" --{name.replace('_', '-')} FILE" * len(digests) + ".",
                )
        return self._request_from(given)

    def _request_from(self, given: Mapping[str, object]) -> Request:
        own = {name: getattr(self, name) for name in _OPTIONS}
        if given.get("image") is None:
            own |= {"strength": None, "noise_level": None}
        if given.get("control_image") is None:
            own |= NO_CONTROL
        return Request(**{**own, **given})

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the picture, whichever engine rounds it and wherever it lies."""
        values = {name: value for name, value in asdict(self).items() if name not in _PROVENANCE}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def parameters(self) -> str:
        """The text in the form that AUTOMATIC1111's web UI writes and other tools read."""
        return infotext(self)

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Read what ``asdict`` gave; `ConfigError` where a field is missing or of a wrong type."""
        names = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        found = set(values) if isinstance(values, dict) else set()
        if not isinstance(values, dict) or not needed <= found <= names:
            raise _unreadable(f"fields differ: {', '.join(sorted(found ^ names))}")
        texts = ("backend", "precision", "model", "fingerprint", "scheduler")
        if not all(isinstance(values[name], str) for name in texts):
            raise _unreadable(f"{', '.join(texts)} must be text")
        if values["num_inference_steps"] is None or values["guidance_scale"] is None:
            raise _unreadable("num_inference_steps and guidance_scale must be numbers")
        loras = values.get("loras", ())
        if not isinstance(loras, list | tuple) or not all(isinstance(lora, str) for lora in loras):
            raise _unreadable("loras must be a list of text")
        lists = ("loras", "control_image", *CONTROL_NUMBERS)
        fields_of: dict[str, Any] = {
            name: tuple(value) if name in lists and isinstance(value, list) else value
            for name, value in values.items()
        }
        recipe = cls(**fields_of)
        digests_or_names = ("image", "mask", "depth_map", "vae", "refiner", "refiner_fingerprint")
        for name in ("revision", *digests_or_names):
            if not isinstance(getattr(recipe, name), str | None):
                raise _unreadable(f"{name} must be text")
        digests = recipe.control_image
        if digests is not None and not (
            isinstance(digests, tuple) and digests and all(isinstance(d, str) for d in digests)
        ):
            raise _unreadable("control_image must be a list of text")
        recipe._check_together()
        recipe._request_from({})  # its inputs come later
        check_control_options(recipe)
        return recipe

    def _check_together(self) -> None:
        """`ConfigError` for fields of which one is nothing without another, or beside it."""
        amounts = [n for n in (self.strength, self.noise_level) if n is not None]
        has_image = self.image is not None
        varies = bool(self.image) and not self.prompt and not amounts
        if (
            (len(amounts) != has_image and not varies)
            or not all(isinstance(amount, int | float) for amount in amounts)
            or ((self.mask or self.depth_map) and not has_image)
        ):
            raise _unreadable(
                "image, mask, depth_map, strength and noise_level do not belong together"
            )
        parts = (self.refiner, self.refiner_fingerprint, self.high_noise_frac)
        if len({part is None for part in parts}) > 1:
            raise _unreadable("refiner, refiner_fingerprint and high_noise_frac belong together")


_OPTIONS = {field.name for field in fields(Request)} & {field.name for field in fields(Recipe)}
_OPTIONS -= {*PICTURES}
"""What both say in the same words."""
_REALS = ("guidance_scale", "guidance_start", "guidance_stop", "eta")
"""Those of them that are written with a point, however they were asked."""


def recipe_of(
    image: ImageRequest,
    plan: Plan,
    manifest: Manifest,
    *,
    backend: str,
    precision: str,
    loras: Sequence[Lora],
    refiner: Manifest | None = None,
) -> Recipe:
    """The recipe of one picture of a plan, by the bundle of ``manifest`` and perhaps a refiner's.

    ``manifest`` has the size that is drawn as its own.
    """
    model, request = manifest.model, plan.request
    height, width = plan.size
    options: dict[str, Any] = {name: getattr(request, name) for name in _OPTIONS}
    options |= {name: float(options[name]) for name in _REALS}
    options |= {name: digest_of(getattr(request, name)) for name in PICTURES}
    options |= {"prompt": image.prompt, "negative_prompt": image.negative_prompt}
    options |= {"seed": image.seed, "scheduler": plan.scheduler, "height": height, "width": width}
    return Recipe(
        **options,
        backend=backend,
        precision=precision,
        loras=tuple(map(str, loras)),
        model=model.source,
        revision=model.revision,
        vae=model.vae,
        fingerprint=manifest.fingerprint,
        refiner=None if refiner is None else refiner.model.source,
        refiner_fingerprint=None if refiner is None else refiner.fingerprint,
    )


def text_from_recipes(recipes: Sequence[Recipe], *, columns: int) -> str:
    """The JSON that a picture file carries: one recipe, or those of a grid, row by row."""
    data = {
        "format_version": FORMAT_VERSION,
        "columns": columns,
        "recipes": [asdict(recipe) for recipe in recipes],
    }
    return json.dumps(data, allow_nan=False)


def recipes_from_text(text: str) -> tuple[list[Recipe], int]:
    """Recipes and columns from `text_from_recipes`; `ConfigError` where it is something else."""
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(str(error)) from error
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        raise _unreadable(f"it is not of format_version {FORMAT_VERSION}")
    recipes, columns = data.get("recipes"), data.get("columns")
    if not isinstance(recipes, list) or not recipes:
        raise _unreadable("it lists no recipes")
    if type(columns) is not int or not 1 <= columns <= len(recipes):
        raise _unreadable(f"columns is {columns!r}")
    return [Recipe.from_json(values) for values in recipes], columns


def _unreadable(why: str) -> ConfigError:
    return ConfigError(
        f"the recipe cannot be read: {why}",
        "Name a picture that sd-run wrote, unedited, or give the prompt and options yourself.",
    )
