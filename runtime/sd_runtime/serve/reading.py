"""Pictures that clients send, decoded one at a time, so that many large ones fill no memory."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from sd_runtime.plan import plan
from sd_runtime.refusal import draining_error
from sd_runtime.request_pictures import fitted
from sd_runtime.serve.connected import while_connected

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request as Connection

    from sd_runtime.engine_room import EngineRoom
    from sd_runtime.request import Request
    from sd_runtime.serve.models import Model
    from sd_runtime.serve.offer import Offer

Read = TypeVar("Read")
_READING: Final = ThreadPoolExecutor(1, thread_name_prefix="reading")


class DrawingBody(Protocol):
    """What a client sends for a picture, in any dialect."""

    @property
    def brings_pictures(self) -> bool:
        """Whether there are any to decode."""

    def request(self, offer: Offer) -> Request:
        """The same for a pipeline, its pictures decoded."""

    def let_go(self) -> None:
        """Keep its pictures no longer: they are decoded, and large."""


async def read_request(
    body: DrawingBody, model: Model, room: EngineRoom, connection: Connection
) -> Request:
    """What ``body`` asks of ``model``, its pictures at the size that they are drawn at.

    They are decoded only where ``room`` has a place for it, which is kept meanwhile. Submit it
    before anything else is awaited, and the place is its own. Raises as `EngineRoom.submit`.
    """
    if not body.brings_pictures:
        return body.request(model.offer)
    with room.kept_place():
        request = await in_turn(connection, lambda: _fitted(body, model, room))
        body.let_go()
        return request


async def in_turn(connection: Connection, read: Callable[[], Read]) -> Read:
    """What ``read`` returns, in a thread, after all that came before; as `while_connected`."""
    run = copy_context().run  # what it logs has the request's id
    loop = asyncio.get_running_loop()
    return await while_connected(connection, loop.run_in_executor(_READING, run, read))


def _fitted(body: DrawingBody, model: Model, room: EngineRoom) -> Request:
    if not room.accepting:  # any more: it would be refused once it is decoded
        raise draining_error()
    request = body.request(model.offer)
    return fitted(request, *plan(request, model.pipeline.bundle.manifest).size)
