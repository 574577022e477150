"""The door for clients of AUTOMATIC1111's web UI: the useful part of ``/sdapi/v1``.

Names are that API's. Fields that would change the picture and that nothing here can do are
refused, not ignored.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from sd_engines.errors import ConfigError
from sd_runtime.image import encode_image, read_parameters
from sd_runtime.request import MAX_SEED
from sd_runtime.request import Request as DrawRequest
from sd_runtime.serve.body import Body
from sd_runtime.serve.drawing import Drawing, timing_header
from sd_runtime.serve.offer import MAX_BODY_BYTES, MAX_GUIDANCE_SCALE, MAX_PROMPT_CHARS, Offer
from sd_runtime.timing import clock

if TYPE_CHECKING:
    from sd_runtime.result import Result
    from sd_runtime.serve.engine_room import EngineRoom
    from sd_runtime.serve.ticket import Ticket

_PLAIN_SPACINGS = ("", "automatic", "uniform", "normal")
"""Sigma spacings that are a sampler's own."""
_OFF: tuple[object, ...] = (False, 0, 0.0, "", [], {})
_ANY_NUMBER: tuple[object, ...] = (-1, 0, 0.0, 1, 1.0, 0.5, 0.7, 0.75)
"""What clients send of numbers that have no effect while their feature is off."""


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

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        **dict.fromkeys(("enable_hr", "restore_faces", "tiling", "save_images"), _OFF),
        **dict.fromkeys(("do_not_save_samples", "do_not_save_grid"), (True, False)),
        **dict.fromkeys(("styles", "script_name", "script_args", "alwayson_scripts"), _OFF),
        **dict.fromkeys(("override_settings", "refiner_checkpoint", "comments"), _OFF),
        **dict.fromkeys(("override_settings_restore_afterwards",), (True, False)),
        **dict.fromkeys(("disable_extra_networks",), (True, False)),
        **dict.fromkeys(("subseed", "seed_resize_from_w", "seed_resize_from_h"), (-1, 0)),
        **dict.fromkeys(("subseed_strength", "s_churn", "s_tmin", "s_min_uncond"), _OFF),
        **dict.fromkeys(("s_noise", "s_tmax"), (0, 1)),
        **dict.fromkeys(("denoising_strength", "refiner_switch_at"), _ANY_NUMBER),
    }

    def request(self, offer: Offer) -> DrawRequest:
        """The same for a pipeline; `ConfigError` where it is more than ``offer``."""
        own = self.model_dump(include=_AS_IN_REQUEST, exclude_none=True)
        if self.seed not in (None, -1):
            own["seed"] = self.seed
        if self.cfg_scale is not None:
            own["guidance_scale"] = self.cfg_scale
        request = DrawRequest.from_mapping(
            {
                "num_inference_steps": self.steps or offer.default_steps,
                "num_images_per_prompt": (self.batch_size or 1) * (self.n_iter or 1),
                "scheduler": self._scheduler(),
                **own,
            }
        )
        offer.check(request)
        return request

    def _scheduler(self) -> str | None:
        """Sampler and sigma spacing as one name: "DPM++ 2M" and "Karras" are dpm++_2m_karras."""
        sampler = self.sampler_name or self.sampler_index
        spacing = (self.scheduler or "").lower()
        if sampler is None or spacing in _PLAIN_SPACINGS or sampler.lower().endswith(spacing):
            return sampler
        return f"{sampler}_{spacing}"


_AS_IN_REQUEST = {"prompt", "negative_prompt", "width", "height", "eta"}


class Drawn(BaseModel):
    """The pictures; ``info`` is JSON in a text, as that API has it."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class PngInfo(Body):
    """A picture to read."""

    image: str = Field(max_length=MAX_BODY_BYTES, description="Base64, a data: URL or bare.")


def a1111_routes(room: EngineRoom, offer: Offer) -> APIRouter:
    """The routes of this door."""
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])

    @router.post("/txt2img", response_model=Drawn)
    async def txt2img(body: TextToImage, connection: Request) -> JSONResponse:
        """Draw pictures from a prompt."""
        result = await Drawing(room, body.request(offer)).result(connection)
        images = []
        if body.send_images is not False:
            images = await asyncio.to_thread(_pictures, result)
        parameters = body.model_dump(mode="json")
        answer = {"images": images, "parameters": parameters, "info": _info(result)}
        return JSONResponse(answer, headers=timing_header(result))

    @router.get("/samplers")
    async def samplers() -> JSONResponse:
        """Every sampler of the bundle, by names that txt2img takes."""
        return JSONResponse(
            [{"name": name, "aliases": [], "options": {}} for name in offer.schedulers]
        )

    @router.get("/sd-models")
    async def sd_models() -> JSONResponse:
        """The one model that is served."""
        model = {
            "title": offer.model,
            "model_name": offer.model,
            "hash": offer.fingerprint[:10],
            "sha256": offer.fingerprint,
            "filename": offer.model,
            "config": None,
        }
        return JSONResponse([model])

    @router.get("/options")
    async def options() -> JSONResponse:
        """The settings that clients ask for; none can be changed."""
        return JSONResponse(
            {
                "sd_model_checkpoint": offer.model,
                "sd_checkpoint_hash": offer.fingerprint,
                "samples_format": "png",
                "CLIP_stop_at_last_layers": 1,
            }
        )

    @router.get("/progress")
    async def progress(skip_current_image: bool = False) -> JSONResponse:
        """How far the drawing is. A preview is made after its next step and told the next time."""
        running = room.running
        ticket = running[0] if running else None
        image = None
        if ticket is not None and not skip_current_image:
            ticket.want_preview()
            if ticket.latest_preview is not None:
                data = await asyncio.to_thread(encode_image, ticket.latest_preview[0], "PNG")
                image = base64.b64encode(data).decode()
        body = _progress(ticket, job_count=len(running) + room.waiting)
        return JSONResponse({**body, "current_image": image})

    @router.post("/interrupt")
    async def interrupt() -> JSONResponse:
        """Stop what is being drawn, whoever asked for it; those requests answer 409."""
        room.interrupt()
        return JSONResponse({})

    @router.post("/png-info")
    async def png_info(body: PngInfo) -> JSONResponse:
        """The text that a picture carries."""
        info = await asyncio.to_thread(read_parameters, _bytes_of(body.image))
        return JSONResponse({"info": info, "items": {"parameters": info} if info else {}})

    return router


def _pictures(result: Result) -> list[str]:
    count = range(len(result.recipes))
    return [base64.b64encode(result.encode(index, "PNG")).decode() for index in count]


def _info(result: Result) -> str:
    first, recipes = result.recipes[0], result.recipes
    return json.dumps(
        {
            "prompt": first.prompt,
            "all_prompts": [recipe.prompt for recipe in recipes],
            "negative_prompt": first.negative_prompt,
            "all_negative_prompts": [recipe.negative_prompt for recipe in recipes],
            "seed": first.seed,
            "all_seeds": [recipe.seed for recipe in recipes],
            "width": first.width,
            "height": first.height,
            "sampler_name": first.scheduler,
            "cfg_scale": first.guidance_scale,
            "steps": first.num_inference_steps,
            "batch_size": len(recipes),
            "sd_model_name": first.model,
            "sd_model_hash": first.fingerprint[:10],
            "infotexts": [recipe.parameters() for recipe in recipes],
        }
    )


_Json: TypeAlias = dict[str, Any]


def _progress(ticket: Ticket | None, *, job_count: int) -> _Json:
    done, num_steps, eta_s = 0, 0, 0.0
    if ticket is not None and ticket.progress is not None and ticket.started_s is not None:
        done, num_steps = ticket.progress.index + 1, ticket.progress.num_steps
        eta_s = (clock() - ticket.started_s) * (num_steps - done) / done
    state = {
        "skipped": False,
        "interrupted": ticket is not None and ticket.cancelled,
        "job": "txt2img" if ticket is not None else "",
        "job_count": job_count,
        "job_no": 0,
        "sampling_step": done,
        "sampling_steps": num_steps,
    }
    share = done / num_steps if num_steps else 0.0
    return {"progress": share, "eta_relative": eta_s, "state": state, "textinfo": None}


def _bytes_of(text: str) -> bytes:
    """The bytes behind base64, bare or as a ``data:`` URL. No other URL is ever followed."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(
            f"the picture is no base64: {error}", "Send its bytes in base64; URLs are not read."
        ) from error
