"""Control pictures as clients of AUTOMATIC1111's web UI send them: its ControlNet extension's.

Names are those of its API, older ones included. A unit's picture is taken as the control picture;
what would make one of it (a preprocessor) is refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from sd_engines.errors import ConfigError, nearest
from sd_engines.spec import CONTROLNET
from sd_runtime.image import picture_from_base64
from sd_runtime.serve.a1111_checkpoint import without_hash
from sd_runtime.serve.body import OFF, Body
from sd_runtime.serve.offer import MAX_CONDITIONING_SCALE, Offer

if TYPE_CHECKING:
    from PIL.Image import Image

    from sd_runtime.serve.a1111_checkpoint import Checkpoint

_JUST_RESIZE = (0, "Just Resize")
_RESIZE_MODES = (
    *(None, *_JUST_RESIZE, 1, 2, "Crop and Resize", "Resize and Fill"),
    *("Scale to Fit (Inner Fit)", "Inner Fit (Scale to Fit)"),
    *("Envelope (Outer Fit)", "Outer Fit (Shrink to Fit)"),
)
_BALANCED = (None, 0, "Balanced")
_CONTROLNET_IS_MORE_IMPORTANT = (2, "ControlNet is more important")


class ControlUnit(Body):
    """A picture for one ControlNet, how much it counts and when."""

    enabled: bool | None = None
    image: str | None = Field(None, description="Base64; an img2img without it takes its own.")
    input_image: str | None = Field(None, description="Its older name.")
    model: str | None = Field(None, description="A ControlNet; left out, the next one.")
    module: str | None = Field(None, description='A preprocessor: "none".')
    weight: float | None = Field(
        None, ge=-MAX_CONDITIONING_SCALE, le=MAX_CONDITIONING_SCALE, allow_inf_nan=False
    )
    guidance_start: float | None = Field(None, ge=0, le=1)
    guidance_end: float | None = Field(None, ge=0, le=1)
    guidance: float | None = Field(None, ge=0, le=1, description="Its older name.")
    control_mode: int | str | None = Field(None, description="The same for all units.")
    guessmode: bool | None = Field(None, description="An older name of control_mode 2.")
    resize_mode: int | str | None = None
    pixel_perfect: bool | None = Field(None, description="A preprocessor's: not used.")
    processor_res: float | None = Field(None, description="A preprocessor's: not used.")
    threshold_a: float | None = Field(None, description="A preprocessor's: not used.")
    threshold_b: float | None = Field(None, description="A preprocessor's: not used.")
    hr_option: int | str | None = Field(None, description="Not used: there is no second pass.")

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        **dict.fromkeys(("low_vram", "lowvram", "save_detected_map", "is_ui"), (True, False)),
        **dict.fromkeys(("inpaint_crop_input_image", "use_preview_as_input"), (True, False)),
        **dict.fromkeys(("mask", "mask_image", "advanced_weighting", "ipadapter_input"), OFF),
        **dict.fromkeys(("effective_region_mask", "rgbbgr_mode", "loopback"), OFF),
        **dict.fromkeys(("batch_images", "output_dir", "generated_image"), OFF),
        "input_mode": (0, "simple", "Simple"),
        "pulid_mode": ("Fidelity",),
        "union_control_type": ("Unknown",),
    }

    @property
    def guess_mode(self) -> bool:
        """As diffusers calls what "ControlNet is more important" does."""
        if self.control_mode in _CONTROLNET_IS_MORE_IMPORTANT or self.guessmode:
            return True
        if self.control_mode not in _BALANCED:
            raise ConfigError(
                f"control_mode is {self.control_mode!r}, which this server cannot do",
                "Send 0 (Balanced), or 2 (ControlNet is more important).",
            )
        return False

    def picture(self, *, image: str | None, size: tuple[int, int]) -> Image:
        """What the ControlNet is to see, for pictures of ``size`` (width, height).

        ``image`` is what an img2img starts from: it takes the place of a picture that is left out.
        Raises `ConfigError` for a preprocessor, no picture, or one that would have to be cut.
        """
        if (self.module or "none").lower() != "none":
            raise ConfigError(
                f"module is {self.module!r}, and this server has no preprocessors",
                'Send what the ControlNet is to see as the image, and "none" as its module.',
            )
        text = self.image or self.input_image or image
        if not text:
            raise ConfigError("a ControlNet unit without a picture", "Send it as its image.")
        if self.resize_mode not in _RESIZE_MODES:
            raise ConfigError(
                f"resize_mode is {self.resize_mode!r}",
                "Send 0, 1 or 2; a picture of the right proportions is the same in all three.",
            )
        picture = picture_from_base64(text)
        width, height = size
        error = abs(picture.width * height - picture.height * width)
        if self.resize_mode not in _JUST_RESIZE and error > max(*picture.size, width, height):
            raise ConfigError(
                f"the control picture is {picture.width}×{picture.height} (width × height), of "
                f"other proportions than {width}×{height}",
                "Crop it first; or send resize_mode 0, and it is stretched.",
            )
        return picture


class ControlNetScript(Body):
    """What the ControlNet extension is asked."""

    args: list[ControlUnit] | None = None


class AlwaysOnScripts(Body):
    """What extensions are asked. There is one here; others are let through where they are off."""

    controlnet: ControlNetScript | None = None

    @model_validator(mode="before")
    @classmethod
    def take_what_is_here(cls, values: Any) -> Any:
        """Names are of any case; `ConfigError` for another extension that is to do something."""
        if not isinstance(values, dict):
            return values
        known = {name: script for name, script in values.items() if name.lower() == "controlnet"}
        if len(known) > 1:
            raise ConfigError("two scripts called controlnet", "Send all units in one of them.")
        for name in values.keys() - known.keys():
            script = values[name]
            args = script.get("args") if isinstance(script, dict) else script
            if args and not (isinstance(args, list) and not any(args)):
                raise ConfigError(
                    f"the extension {name!r} in alwayson_scripts, which this server has not",
                    "Leave it out; controlnet is the one that is here.",
                )
        return {"controlnet": next(iter(known.values()), None)}

    def options(self, offer: Offer, *, image: str | None, size: tuple[int, int]) -> dict[str, Any]:
        """The same as a request names it, the pictures decoded; see `ControlUnit.picture`.

        Raises `ConfigError` for another number of units than ``offer`` has ControlNets.
        """
        given = (self.controlnet and self.controlnet.args) or []
        units = [unit for unit in given if unit.enabled is not False]
        if not units:
            return {}
        offer.check_control_pictures(len(units))
        units = in_order(units, offer.controlnets)
        modes = {unit.guess_mode for unit in units}
        if len(modes) > 1:
            raise ConfigError(
                "units of different control_mode", "Send one control_mode for all of them."
            )
        return {
            "control_image": [unit.picture(image=image, size=size) for unit in units],
            "controlnet_conditioning_scale": [_or(unit.weight, 1.0) for unit in units],
            "control_guidance_start": [_or(unit.guidance_start, 0.0) for unit in units],
            "control_guidance_end": [
                _or(unit.guidance_end, _or(unit.guidance, 1.0)) for unit in units
            ],
            "guess_mode": modes.pop(),
        }


def in_order(units: list[ControlUnit], names: tuple[str, ...]) -> list[ControlUnit]:
    """``units``, as many as ``names``, in the order of these.

    Those that name no model take what is left, in their order. Raises `ConfigError` for a model
    that is not there, or is named twice.
    """
    known = {name: index for index, name in enumerate(names)}
    known |= {f"{CONTROLNET}{index}": index for index in range(len(names))}
    placed: dict[int, ControlUnit] = {}
    unnamed = []
    for unit in units:
        name = without_hash(unit.model or "")
        if name.lower() in ("", "none"):
            unnamed.append(unit)
            continue
        if name not in known:
            raise ConfigError(f"there is no ControlNet {name!r} here", nearest(name, names))
        if known[name] in placed:
            raise ConfigError(
                f"two units for the ControlNet {name}", "Send one for each, or leave models out."
            )
        placed[known[name]] = unit
    left = iter(unnamed)
    return [placed[index] if index in placed else next(left) for index in range(len(names))]


def controlnet_routes(checkpoint: Checkpoint) -> APIRouter:
    """What clients of the extension ask before they send a unit."""
    router = APIRouter(prefix="/controlnet", tags=["AUTOMATIC1111"])

    @router.get("/version")
    async def version() -> JSONResponse:
        """Of the extension's API."""
        return JSONResponse({"version": 3})

    @router.get("/model_list")
    async def model_list() -> JSONResponse:
        """The ControlNets of the checkpoint that draws, by names that a unit takes."""
        return JSONResponse({"model_list": list(checkpoint.current.offer.controlnets)})

    @router.get("/module_list")
    async def module_list() -> JSONResponse:
        """Preprocessors: there are none."""
        detail = {"none": {"model_free": False, "sliders": []}}
        return JSONResponse({"module_list": ["none"], "module_detail": detail})

    @router.get("/settings")
    async def settings() -> JSONResponse:
        """How many units a request may have."""
        count = len(checkpoint.current.offer.controlnets)
        return JSONResponse({"control_net_unit_count": count})

    return router


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
