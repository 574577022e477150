"""All doors of one engine room as one ASGI application."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import BaseModel

from sd_runtime.serve.a1111 import a1111_routes
from sd_runtime.serve.a1111_checkpoint import Checkpoint
from sd_runtime.serve.a1111_controlnet import controlnet_routes
from sd_runtime.serve.access import Access
from sd_runtime.serve.error_body import install_error_handlers
from sd_runtime.serve.openai_images import openai_routes
from sd_runtime.serve.operations import operation_routes
from sd_runtime.serve.page import page_routes

if TYPE_CHECKING:
    from sd_runtime.engine_room import EngineRoom
    from sd_runtime.serve.metrics import Metrics
    from sd_runtime.serve.models import Models


class Problem(BaseModel):
    """An error: an object in OpenAI's dialect, a short code in AUTOMATIC1111's."""

    error: dict[str, Any] | str


def make_app(room: EngineRoom, models: Models, *, metrics: Metrics, api_key: str | None) -> Access:
    """The application that has ``room`` draw with ``models``, for those who have the key."""
    app = FastAPI(
        title="sd-serve",
        version=version("sd-toolkit"),
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": Problem}, "5XX": {"model": Problem}},
    )
    install_error_handlers(app)
    app.include_router(openai_routes(room, models))
    checkpoint = Checkpoint(models)
    app.include_router(a1111_routes(room, checkpoint))
    app.include_router(controlnet_routes(checkpoint))
    app.include_router(operation_routes(room, metrics))
    app.include_router(page_routes())
    return Access(app, metrics=metrics, api_key=api_key)
