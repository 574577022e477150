"""The door for clients of AUTOMATIC1111's web UI: the useful part of ``/sdapi/v1``."""

from __future__ import annotations

import asyncio
import base64
import json
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from sd_runtime.image import bytes_from_base64, encode_image, read_parameters
from sd_runtime.serve.a1111_bodies import Drawn, ImageToImage, Options, PngInfo, TextToImage
from sd_runtime.serve.drawing import Drawing, timing_header
from sd_runtime.serve.json_route import JsonRoute
from sd_runtime.serve.reading import in_turn, read_request
from sd_runtime.timing import clock

if TYPE_CHECKING:
    from sd_runtime.engine_room import EngineRoom
    from sd_runtime.result import Result
    from sd_runtime.serve.a1111_checkpoint import Checkpoint
    from sd_runtime.serve.models import Model
    from sd_runtime.ticket import Ticket


def a1111_routes(room: EngineRoom, checkpoint: Checkpoint) -> APIRouter:
    """The routes of this door."""
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], route_class=JsonRoute)

    @router.post("/txt2img", response_model=Drawn)
    async def txt2img(body: TextToImage, connection: Request) -> JSONResponse:
        """Draw pictures from a prompt."""
        return await drawn(body, connection)

    @router.post("/img2img", response_model=Drawn)
    async def img2img(body: ImageToImage, connection: Request) -> JSONResponse:
        """Draw pictures from a prompt and a picture, or only what a mask says of it."""
        return await drawn(body, connection)

    async def drawn(body: TextToImage, connection: Request) -> JSONResponse:
        model = checkpoint.of(body.override_settings)
        request = await read_request(body, model, room, connection)
        drawing = Drawing(room, request, model.pipeline, partial(_response, body=body))
        if body.override_settings_restore_afterwards is False:
            checkpoint.current = model
        return await drawing.result(connection)

    @router.get("/samplers")
    async def samplers() -> JSONResponse:
        """Every sampler of the checkpoint that draws, by names that txt2img takes."""
        names = checkpoint.current.offer.schedulers
        return JSONResponse([{"name": name, "aliases": [], "options": {}} for name in names])

    @router.get("/sd-models")
    async def sd_models() -> JSONResponse:
        """The models that are served."""
        return JSONResponse([_sd_model(model) for model in checkpoint.models])

    @router.get("/options")
    async def options() -> JSONResponse:
        """The settings that clients ask for."""
        offer = checkpoint.current.offer
        return JSONResponse(
            {
                "sd_model_checkpoint": offer.model,
                "sd_checkpoint_hash": offer.fingerprint,
                "samples_format": "png",
                "CLIP_stop_at_last_layers": 1,
            }
        )

    @router.post("/options")
    async def set_options(body: Options) -> JSONResponse:
        """Choose the checkpoint that draws for all clients of this door that do not say."""
        checkpoint.current = checkpoint.of(body)
        return JSONResponse(None)

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
    async def png_info(body: PngInfo, connection: Request) -> JSONResponse:
        """The text that a picture carries."""
        read = partial(read_parameters, bytes_from_base64(body.image))
        info = await in_turn(connection, read)
        return JSONResponse({"info": info, "items": {"parameters": info} if info else {}})

    return router


def _response(result: Result, body: TextToImage) -> JSONResponse:
    count = range(len(result.recipes) if body.send_images is not False else 0)
    images = [base64.b64encode(result.encode(index, "PNG")).decode() for index in count]
    parameters = body.model_dump(mode="json", exclude={"init_images", "mask", "alwayson_scripts"})
    answer = {"images": images, "parameters": parameters, "info": _info(result)}
    return JSONResponse(answer, headers=timing_header(result))


def _info(result: Result) -> str:
    first, recipes = result.recipes[0], result.recipes
    return json.dumps(
        {
            "prompt": first.prompt,
            "all_prompts": [recipe.prompt for recipe in recipes],
            "negative_prompt": first.negative_prompt or "",
            "all_negative_prompts": [recipe.negative_prompt or "" for recipe in recipes],
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


def _sd_model(model: Model) -> dict[str, Any]:
    offer = model.offer
    return {
        "title": offer.model,
        "model_name": offer.model,
        "hash": offer.fingerprint[:10],
        "sha256": offer.fingerprint,
        "filename": offer.model,
        "config": None,
    }


def _progress(ticket: Ticket | None, *, job_count: int) -> dict[str, Any]:
    done, num_steps, eta_s = 0, 0, 0.0
    if ticket is not None and ticket.progress is not None and ticket.started_s is not None:
        done, num_steps = ticket.progress.index + 1, ticket.progress.num_steps
        eta_s = (clock() - ticket.started_s) * (num_steps - done) / done
    state = {
        "skipped": False,
        "interrupted": ticket is not None and ticket.cancelled,
        "job": _job(ticket),
        "job_count": job_count,
        "job_no": 0,
        "sampling_step": done,
        "sampling_steps": num_steps,
    }
    share = done / num_steps if num_steps else 0.0
    return {"progress": share, "eta_relative": eta_s, "state": state, "textinfo": None}


def _job(ticket: Ticket | None) -> str:
    if ticket is None:
        return ""
    return "txt2img" if ticket.request.image is None else "img2img"
