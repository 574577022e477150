"""What is done for a client, for as long as it is there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from sd_runtime.refusal import client_left_error

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.requests import Request as Connection

Outcome = TypeVar("Outcome")


async def while_connected(connection: Connection, work: Awaitable[Outcome]) -> Outcome:
    """What ``work`` comes to; a client that leaves before cancels it, and gets status 499.

    ``connection`` is the HTTP request, its body read.
    """
    left = asyncio.ensure_future(_disconnected(connection))
    ended = asyncio.ensure_future(work)
    try:
        await asyncio.wait((left, ended), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            raise client_left_error()
        return ended.result()
    finally:
        left.cancel()
        ended.cancel()


async def _disconnected(connection: Connection) -> None:
    while (await connection.receive())["type"] != "http.disconnect":
        pass
