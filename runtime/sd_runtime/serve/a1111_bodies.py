"""What clients of AUTOMATIC1111's web UI send for a picture, and what they get.

Names are that API's. Fields that would change the picture and that nothing here can do are
refused, not ignored.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from PIL import ImageOps
from pydantic import BaseModel, Field

from sd_engines.errors import ConfigError
from sd_runtime.image import picture_from_base64
from sd_runtime.request import MAX_SEED, Request
from sd_runtime.scheduler_config import is_scheduler
from sd_runtime.serve.a1111_controlnet import AlwaysOnScripts
from sd_runtime.serve.body import OFF, Body
from sd_runtime.serve.offer import MAX_GUIDANCE_SCALE, MAX_PROMPT_CHARS, Offer

if TYPE_CHECKING:
    from PIL.Image import Image

_AS_IN_REQUEST = {"prompt", "negative_prompt", "width", "height", "eta"}
_PLAIN_SPACINGS = ("uniform", "normal")
"""Sigma spacings that are a sampler's own here."""
_AUTOMATIC_SPACINGS = {
    **dict.fromkeys(("DPM++ 2M", "DPM2", "DPM2 a"), "karras"),
    **dict.fromkeys(("DPM++ 2M SDE", "DPM++ 3M SDE"), "exponential"),
}
"""Those that web UI takes where none is named, by its own names of samplers."""
_EXTRA_NETWORK = re.compile("<(lora|lyco|hypernet):", re.IGNORECASE)
_PLAIN_MASK = {
    **dict.fromkeys(("mask_blur", "mask_blur_x", "mask_blur_y"), 0),
    "inpainting_fill": 1,
    "inpaint_full_res": 0,
}
"""What masks are here: sharp, over what they hide, for the whole picture."""


class Options(Body):
    """Settings. The model can be chosen; all else is as it is."""

    sd_model_checkpoint: str | None = Field(None, description="A model, by its title.")
    sd_checkpoint_hash: str | None = Field(None, description="Not used.")

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "CLIP_stop_at_last_layers": (1,),
        "sd_vae": ("", "None", "Automatic"),
        "samples_format": ("png",),
        "eta_noise_seed_delta": (0,),
        **dict.fromkeys(("samples_save", "grid_save", "return_grid"), (True, False)),
    }


class TextToImage(Body):
    """What to draw. A field that is null or left out means the default."""

    prompt: str = Field("", max_length=MAX_PROMPT_CHARS)
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT_CHARS)
    seed: int | None = Field(None, ge=-1, le=MAX_SEED, description="-1 is a random one.")
    sampler_name: str | None = Field(None, max_length=100)
    sampler_index: str | None = Field(None, max_length=100, description="Its older name.")
    scheduler: str | None = Field(None, max_length=100, description="Karras, Exponential, Beta …")
    batch_size: int | None = Field(None, ge=1)
    n_iter: int | None = Field(None, ge=1, description="Times batch_size: the pictures in all.")
    steps: int | None = Field(None, ge=1)
    cfg_scale: float | None = Field(None, ge=0, le=MAX_GUIDANCE_SCALE, allow_inf_nan=False)
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    eta: float | None = Field(None, ge=0, le=1)
    send_images: bool | None = None
    override_settings: Options | None = Field(None, description="For this request.")
    override_settings_restore_afterwards: bool | None = Field(
        None, description="False: for those after it as well."
    )
    alwayson_scripts: AlwaysOnScripts | None = Field(
        None, description="controlnet: its units' pictures are taken as control pictures."
    )

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        **dict.fromkeys(("enable_hr", "restore_faces", "tiling", "save_images"), OFF),
        **dict.fromkeys(("do_not_save_samples", "do_not_save_grid"), (True, False)),
        "disable_extra_networks": (True, False),
        **dict.fromkeys(("styles", "script_name", "script_args", "infotext"), OFF),
        **dict.fromkeys(("refiner_checkpoint", "comments"), OFF),
        **dict.fromkeys(("seed_resize_from_w", "seed_resize_from_h"), (-1, 0)),
        **dict.fromkeys(("subseed_strength", "s_churn", "s_tmin", "s_min_uncond"), OFF),
        **dict.fromkeys(("s_noise", "s_tmax"), (0, 1)),
    }
    unused: ClassVar[frozenset[str]] = frozenset(
        {
            *("hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y"),
            *("hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt"),
            *("hr_negative_prompt", "hr_cfg", "firstphase_width", "firstphase_height"),
            *("denoising_strength", "firstpass_image", "refiner_switch_at", "subseed"),
            "force_task_id",
        }
    )

    def request(self, offer: Offer) -> Request:
        """The same for a pipeline; `ConfigError` where it is more than ``offer``."""
        self._check_prompt()
        own = self.model_dump(include=_AS_IN_REQUEST, exclude_none=True) | self.pictures()
        if not self.negative_prompt:
            own.pop("negative_prompt", None)  # as there: zeros to Stable Diffusion XL
        if self.alwayson_scripts is not None:
            size = (self.width or offer.width, self.height or offer.height)
            own |= self.alwayson_scripts.options(offer, image=self.starts_from(), size=size)
        if self.seed not in (None, -1):
            own["seed"] = self.seed
        if self.cfg_scale is not None:
            own["guidance_scale"] = self.cfg_scale
        request = Request.from_mapping(
            {
                "num_inference_steps": self.steps or offer.default_steps,
                "num_images_per_prompt": (self.batch_size or 1) * (self.n_iter or 1),
                "scheduler": self._scheduler(),
                "prompt_weighting": True,
                **own,
            }
        )
        offer.check(request)
        return request

    @property
    def brings_pictures(self) -> bool:
        """Whether there may be any to decode."""
        return self.alwayson_scripts is not None

    def pictures(self) -> dict[str, Any]:
        """What the drawing starts from, as a request names it."""
        return {}

    def starts_from(self) -> str | None:
        """Its picture as it was sent."""
        return None

    def let_go(self) -> None:
        """Keep its pictures no longer."""
        self.alwayson_scripts = None

    def _check_prompt(self) -> None:
        if found := _EXTRA_NETWORK.search(self.prompt):
            raise ConfigError(
                f"{found[0]}…> in the prompt, and LoRAs are not chosen here by a request",
                "Leave it out; a server puts LoRAs on when it starts: sd-serve --lora FILE=SCALE.",
            )

    def _scheduler(self) -> str | None:
        """Sampler and sigma spacing as one name: "DPM++ 2M" and "Karras" are dpm++_2m_karras."""
        sampler = self.sampler_name or self.sampler_index
        spacing = (self.scheduler or "").lower()
        if spacing in ("", "automatic"):
            spacing = _AUTOMATIC_SPACINGS.get(sampler or "", "")
        if not spacing or spacing in _PLAIN_SPACINGS:
            return sampler
        if sampler is None:
            raise ConfigError(
                f"scheduler is {self.scheduler!r} without a sampler",
                "Send the sampler_name that it is for, such as DPM++ 2M; or leave it out.",
            )
        if sampler.lower().endswith(spacing):
            return sampler
        name = f"{sampler}_{spacing}"
        if not is_scheduler(name) and is_scheduler(sampler):
            raise ConfigError(
                f"the sampler {sampler!r} has no scheduler {self.scheduler!r}",
                "Leave scheduler out, or take a sampler of /sdapi/v1/samplers that has it.",
            )
        return name


class ImageToImage(TextToImage):
    """What to make of a picture, or of what its mask shows of it."""

    init_images: list[str] = Field(
        min_length=1, max_length=1, description="Base64, a data: URL or bare."
    )
    mask: str | None = Field(
        None,
        description="What is white in it is repainted; in one with see-through parts, what is "
        "drawn.",
    )
    denoising_strength: float = Field(
        0.75, ge=0, le=1, description="The share of the steps that run."
    )
    inpainting_mask_invert: Literal[0, 1] | None = None
    mask_blur: int | None = None
    mask_blur_x: int | None = None
    mask_blur_y: int | None = None
    inpainting_fill: int | None = None
    inpaint_full_res: bool | int | None = None
    inpaint_full_res_padding: int | None = None

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        **TextToImage.neutral,
        **dict.fromkeys(("include_init_images", "resize_mode"), OFF),
        "initial_noise_multiplier": (0, 1, 1.0),
        "mask_round": (True,),
        "latent_mask": OFF,
    }
    unused: ClassVar[frozenset[str]] = TextToImage.unused | {"image_cfg_scale"}

    @property
    def brings_pictures(self) -> bool:
        """It starts from one."""
        return True

    def starts_from(self) -> str:
        """Its picture as it was sent."""
        return self.init_images[0]

    def let_go(self) -> None:
        """Keep its pictures no longer."""
        super().let_go()
        self.init_images.clear()
        self.mask = None

    def pictures(self) -> dict[str, Any]:
        """The picture and its mask, decoded, and the strength."""
        pictures: dict[str, Any] = {
            "image": picture_from_base64(self.init_images[0]),
            "strength": self.denoising_strength,
        }
        if not self.mask:  # "" is none, as there
            return pictures
        for name, value in _PLAIN_MASK.items():
            if (given := getattr(self, name)) is not None and given != value:
                raise ConfigError(
                    f"{name} is {given} with a mask, which this server cannot do",
                    f"Send {value}: masks are applied as they are, to the whole picture.",
                )
        mask = _white_where_drawn(picture_from_base64(self.mask))
        return {**pictures, "mask": ImageOps.invert(mask) if self.inpainting_mask_invert else mask}


def _white_where_drawn(mask: Image) -> Image:
    """``mask`` without see-through parts: where it has some, what is drawn is white, as there."""
    alpha = mask.convert("RGBA").getchannel("A")
    if alpha.getextrema() == (255, 255):
        return mask.convert("RGB")
    return alpha.point([*[0] * 129, *[255] * 127])


class Drawn(BaseModel):
    """The pictures; ``info`` is JSON in a text, as that API has it."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class PngInfo(Body):
    """A picture to read."""

    image: str = Field(description="Base64, a data: URL or bare.")
