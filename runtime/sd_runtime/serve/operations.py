"""The door for operators: whether the server lives, whether it is ready, and what it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

if TYPE_CHECKING:
    from sd_runtime.engine_room import EngineRoom
    from sd_runtime.serve.metrics import Metrics

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
"""What needs no key."""
_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}


def operation_routes(room: EngineRoom, metrics: Metrics) -> APIRouter:
    """The routes of this door."""
    router = APIRouter(tags=["operations"])

    @router.get("/health/live")
    @router.head("/health/live", include_in_schema=False)
    async def live() -> JSONResponse:
        """503 where the process should be started anew."""
        return JSONResponse({"live": not room.finished}, status_code=503 if room.finished else 200)

    @router.get("/health/ready")
    @router.head("/health/ready", include_in_schema=False)
    async def ready() -> JSONResponse:
        """503 once the server drains. A full queue is still ready: it answers 429."""
        body = {"ready": room.accepting, "waiting": room.waiting}
        return JSONResponse(body, status_code=200 if room.accepting else 503)

    @router.get("/metrics", response_class=Response, responses=_TEXT)
    @router.head("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
