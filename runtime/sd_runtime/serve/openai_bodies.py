"""What OpenAI's clients send for a picture, and what they get.

What their Images API has no word for is spelt as diffusers spells it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sd_engines.errors import ConfigError
from sd_runtime.control_options import CONTROL_NUMBERS
from sd_runtime.image import picture_from_base64, picture_from_bytes
from sd_runtime.request import MAX_SEED, Request
from sd_runtime.serve.body import Body
from sd_runtime.serve.offer import (
    MAX_CONDITIONING_SCALE,
    MAX_GUIDANCE_SCALE,
    MAX_PROMPT_CHARS,
    Offer,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from starlette.datastructures import FormData

_AS_IN_REQUEST = {
    *("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale"),
    *("guidance_start", "guidance_stop", "cache_interval", "prompt_weighting"),
    *("scheduler", "eta", "guess_mode", *CONTROL_NUMBERS),
}
_LISTS = {"control_images", *CONTROL_NUMBERS}
_Share = Annotated[float, Field(ge=0, le=1)]
_Scale = Annotated[
    float, Field(ge=-MAX_CONDITIONING_SCALE, le=MAX_CONDITIONING_SCALE, allow_inf_nan=False)
]


class Asked(Body):
    """What generations and edits have in common. A field that is null or left out: the default."""

    prompt: str = Field(max_length=MAX_PROMPT_CHARS)
    model: str | None = None
    n: int | None = Field(None, ge=1, description="Pictures. [default: 1]")
    size: str | None = Field(
        None,
        pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
        description="WIDTHxHEIGHT in pixels, as the bundle was built.",
    )
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    stream: bool | None = Field(None, description="Server-sent events instead of one answer.")
    partial_images: int | None = Field(None, ge=0, le=3, description="Pictures on the way.")
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT_CHARS)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Picture i takes seed + i.")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=MAX_GUIDANCE_SCALE, allow_inf_nan=False)
    guidance_start: _Share | None = None
    guidance_stop: _Share | None = None
    cache_interval: int | None = Field(None, ge=1)
    prompt_weighting: bool | None = Field(None, description="Brackets in prompts are weights.")
    scheduler: str | None = Field(None, max_length=100)
    eta: _Share | None = None
    guess_mode: bool | None = Field(None, description="ControlNets count most, prompts less.")
    user: str | None = Field(None, description="Not used.")

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "background": ("auto", "opaque"),
        "moderation": ("auto", "low"),
        "quality": ("auto", "standard"),
    }

    def request(self, offer: Offer) -> Request:
        """The same for a pipeline; `ConfigError` where it is more than ``offer``."""
        if self.partial_images and not self.stream:
            raise ConfigError("partial_images without stream", "Set stream to true as well.")
        sources = self.control_sources()
        if sources is not None:
            offer.check_control_pictures(len(sources))
        own = self.model_dump(include=_AS_IN_REQUEST, exclude_none=True) | self.pictures()
        if sources is not None:
            own["control_image"] = [_picture(source) for source in sources]
        if self.size not in (None, "auto"):
            own["width"], own["height"] = (int(part) for part in self.size.split("x"))
        request = Request.from_mapping(
            {
                "num_inference_steps": offer.default_steps,
                "num_images_per_prompt": self.n or 1,
                **own,
            }
        )
        offer.check(request)
        return request

    @property
    def brings_pictures(self) -> bool:
        """Whether there are any to decode."""
        raise NotImplementedError

    def pictures(self) -> dict[str, Any]:
        """What the drawing starts from, as a request names it."""
        return {}

    def control_sources(self) -> Sequence[UploadFile | str] | None:
        """What leads it, as it was sent."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Keep its pictures no longer."""
        raise NotImplementedError


class Generation(Asked):
    """What to draw. A field that is null or left out means the default."""

    control_images: list[str] | None = Field(
        None, description="One for each ControlNet of the model, in base64."
    )
    controlnet_conditioning_scale: _Scale | list[_Scale] | None = None
    control_guidance_start: _Share | list[_Share] | None = None
    control_guidance_end: _Share | list[_Share] | None = None

    @property
    def brings_pictures(self) -> bool:
        """Whether it is led by any."""
        return self.control_images is not None

    def control_sources(self) -> Sequence[UploadFile | str] | None:
        """The control pictures in base64."""
        return self.control_images

    def let_go(self) -> None:
        """Keep its pictures no longer."""
        self.control_images = None


class Edit(Asked):
    """What to make of a picture. A form, so that all of it but the pictures is text."""

    model_config = ConfigDict(strict=False)

    control_images: list[UploadFile | str] | None = Field(
        None, description="One for each ControlNet of the model: files, or base64."
    )
    controlnet_conditioning_scale: list[_Scale] | None = None
    control_guidance_start: list[_Share] | None = None
    control_guidance_end: list[_Share] | None = None
    image: UploadFile = Field(description="PNG, JPEG or WebP; clients may call it image[].")
    mask: UploadFile | None = Field(
        None,
        description="What is fully see-through in it is repainted; in one without such parts, "
        "what is white.",
    )
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        description="The share of the steps that run. [default: 0.8, 1 with a mask]",
    )

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        **Asked.neutral,
        "input_fidelity": ("low",),
    }

    @model_validator(mode="before")
    @classmethod
    def take_lists(cls, values: Any) -> Any:
        """Clients that could send several of something call it ``name[]``."""
        if not isinstance(values, dict):
            return values
        taken = {name: value for name, value in values.items() if not name.endswith("[]")}
        for listed in values.keys() - taken.keys():
            name, value = listed.removesuffix("[]"), values[listed]
            if name in taken:
                raise ConfigError(f"{name} and {listed}", "Send one of them.")
            if isinstance(value, list) and name not in _LISTS:
                raise ConfigError(f"{len(value)} of {listed}", "Send one.")
            several = name in _LISTS and not isinstance(value, list)
            taken[name] = [value] if several else value
        return taken

    @property
    def brings_pictures(self) -> bool:
        """It starts from one."""
        return True

    def control_sources(self) -> Sequence[UploadFile | str] | None:
        """The control pictures, as files or in base64."""
        return self.control_images

    def let_go(self) -> None:
        """Keep its pictures no longer."""
        for source in (self.image, self.mask, *(self.control_images or ())):
            if source is not None and not isinstance(source, str):
                source.file.close()
        self.control_images = None

    def pictures(self) -> dict[str, Any]:
        """The picture and its mask, decoded, and the strength."""
        pictures: dict[str, Any] = {"image": picture_from_bytes(self.image.file.read())}
        if self.strength is not None:
            pictures["strength"] = self.strength
        if self.mask is not None:
            pictures["mask"] = _mask_from_bytes(self.mask.file.read())
        return pictures


def check_once(form: FormData) -> None:
    """`ConfigError` for a field that is there twice and no list: all but one would be dropped."""
    for name in form:
        times = len(form.getlist(name))
        if times > 1 and name.removesuffix("[]") not in _LISTS:
            raise ConfigError(f"{name} is there {times} times", "Send it once.")


class Picture(BaseModel):
    """One picture, and what it was drawn with."""

    b64_json: str
    seed: int
    recipe: dict[str, Any]
    nsfw_content_detected: bool | None


class Pictures(BaseModel):
    """All pictures of one request."""

    created: int
    data: list[Picture]
    output_format: str
    size: str
    background: str


def _picture(source: UploadFile | str) -> Image:
    if isinstance(source, str):
        return picture_from_base64(source)
    return picture_from_bytes(source.file.read())


def _mask_from_bytes(data: bytes) -> Image:
    """White where something is to be repainted."""
    mask = picture_from_bytes(data)
    alpha = mask.convert("RGBA").getchannel("A")
    if alpha.getextrema() == (255, 255):
        return mask
    return alpha.point([255, *[0] * 255])
