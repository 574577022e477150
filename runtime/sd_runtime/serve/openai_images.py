"""The door for OpenAI's clients: ``/v1/images/generations``, ``…/edits`` and ``/v1/models``."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.formparsers import MultiPartParser

from sd_runtime.image import encode_image
from sd_runtime.serve.drawing import Drawing, timing_header
from sd_runtime.serve.error_body import as_sd_error, log_failure, openai_body
from sd_runtime.serve.json_route import JsonRoute
from sd_runtime.serve.offer import MAX_BODY_BYTES, MAX_PROMPT_CHARS, Offer
from sd_runtime.serve.openai_bodies import Asked, Edit, Generation, Pictures, check_once
from sd_runtime.serve.reading import read_request
from sd_runtime.ticket import Progress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from sd_runtime.engine_room import EngineRoom
    from sd_runtime.request import Request as DrawRequest
    from sd_runtime.result import Result
    from sd_runtime.serve.models import Models

_ANSWERS: dict[str, Any] = {
    "response_model": Pictures,
    "responses": {200: {"content": {"text/event-stream": {}}}},
}


class DrawingStream(StreamingResponse):
    """Server-sent events of a drawing that is cancelled when the client leaves, however early."""

    def __init__(self, drawing: Drawing[Any], content: AsyncIterator[str]) -> None:
        super().__init__(
            content,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._drawing = drawing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._drawing.cancel()


def openai_routes(room: EngineRoom, models: Models) -> APIRouter:
    """The routes of this door."""
    # Pictures stay in memory, as the body does: a root that can only be read has no other place.
    MultiPartParser.spool_max_size = MAX_BODY_BYTES
    router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)

    @router.post("/v1/images/generations", **_ANSWERS)
    async def generate(body: Generation, connection: Request) -> Response:
        """Draw pictures from a prompt."""
        return await drawn(body, connection)

    @router.post("/v1/images/edits", **_ANSWERS)
    async def edit(
        body: Annotated[Edit, Form(media_type="multipart/form-data")], connection: Request
    ) -> Response:
        """Draw pictures from a prompt and a picture, or only what a mask says of it."""
        check_once(await connection.form())
        return await drawn(body, connection)

    async def drawn(body: Asked, connection: Request) -> Response:
        model = models.find(body.model)
        request, pipeline = await read_request(body, model, room, connection), model.pipeline
        format_ = (body.output_format or "png").upper()
        draw = partial(Drawing, room, request, pipeline, format_=format_)
        if body.stream:
            previews = body.partial_images or 0
            drawing = draw(partial(_pictures, format_=format_), previews=previews, steps=True)
            return DrawingStream(drawing, _events(drawing, room, format_))
        return await draw(partial(_response, format_=format_)).result(connection)

    @router.get("/v1/models")
    async def list_models() -> JSONResponse:
        """The models that are served, and what one may ask of each; the first is the default."""
        data = [_model(model.offer) for model in models]
        return JSONResponse({"object": "list", "data": data})

    @router.get("/v1/models/{model}")
    async def model(model: str) -> JSONResponse:
        """One of them, by name."""
        return JSONResponse(_model(models.find(model).offer))

    return router


async def _events(
    drawing: Drawing[list[dict[str, Any]]], room: EngineRoom, format_: str
) -> AsyncIterator[str]:
    """OpenAI's events. Comment lines, which their clients skip, say how far the drawing is."""
    kind = "image_generation" if drawing.ticket.request.image is None else "image_edit"
    yield _comment(waiting=room.waiting)
    form = _form(drawing.ticket.request, format_, "created_at")
    form["quality"] = "auto"
    num_partials = 0
    try:
        async for event in drawing.events():
            if isinstance(event, Progress):
                yield _comment(step=event.index + 1, num_steps=event.num_steps)
                if event.preview is None:
                    continue
                for number, pixels in enumerate(event.preview):
                    data = await asyncio.to_thread(encode_image, pixels, format_)
                    yield _event(
                        f"{kind}.partial_image",
                        b64_json=base64.b64encode(data).decode(),
                        partial_image_index=num_partials,
                        image_index=event.first_image + number,
                        **form,
                    )
                num_partials += 1
            else:
                for number, picture in enumerate(event):
                    yield _event(f"{kind}.completed", image_index=number, **picture, **form)
    except Exception as error:  # the head is sent: clients are told by one more event
        log_failure(error)
        yield f"event: error\ndata: {json.dumps(openai_body(as_sd_error(error)))}\n\n"


def _event(kind: str, **values: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **values})}\n\n"


def _comment(**values: int) -> str:
    return f": {json.dumps(values)}\n\n"


def _form(request: DrawRequest, format_: str, created: str) -> dict[str, Any]:
    """What all answers say of their pictures; of the ``request`` nothing is left open."""
    return {
        created: int(time.time()),
        "output_format": format_.lower(),
        "size": f"{request.width}x{request.height}",
        "background": "opaque",
    }


def _response(result: Result, format_: str) -> JSONResponse:
    pictures = _pictures(result, format_)
    answer = {"data": pictures, **_form(result.request, format_, "created")}
    return JSONResponse(answer, headers=timing_header(result))


def _pictures(result: Result, format_: str) -> list[dict[str, Any]]:
    flags = result.nsfw_content_detected
    return [
        {
            "b64_json": base64.b64encode(result.encode(index, format_)).decode(),
            "seed": recipe.seed,
            "recipe": asdict(recipe),
            "nsfw_content_detected": None if flags is None else flags[index],
        }
        for index, recipe in enumerate(result.recipes)
    ]


def _model(offer: Offer) -> dict[str, Any]:
    extra = {
        name: value for name, value in asdict(offer).items() if name not in ("model", "created")
    }
    return {
        "id": offer.model,
        "object": "model",
        "created": offer.created,
        "owned_by": "sd-toolkit",
        **extra,
        "max_prompt_chars": MAX_PROMPT_CHARS,
    }
