"""A ticket of the engine room as an event loop sees it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from sd_runtime.serve.connected import while_connected
from sd_runtime.ticket import Progress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from concurrent.futures import Future

    from starlette.requests import Request as Connection

    from sd_runtime.engine_room import EngineRoom
    from sd_runtime.pipeline import Pipeline
    from sd_runtime.request import Request
    from sd_runtime.result import Result


Answer = TypeVar("Answer")
_ANSWERING: Final = ThreadPoolExecutor(thread_name_prefix="answering")


class Drawing(Generic[Answer]):
    """One request on its way. Made inside a running event loop; raises as `EngineRoom.submit`.

    ``answer`` makes of its result what the door sends, as soon as it is drawn, in a thread that
    neither draws nor runs the loop: encoding takes a while. Whoever made it calls `cancel` when
    nobody listens any more; after the end that does nothing.
    """

    def __init__(
        self,
        room: EngineRoom,
        request: Request,
        pipeline: Pipeline,
        answer: Callable[[Result], Answer],
        *,
        previews: int = 0,
        steps: bool = False,
        format_: str | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._answer = answer
        self._events: asyncio.Queue[Progress | Future[Answer]] = asyncio.Queue()
        self.ticket = room.submit(
            request,
            pipeline=pipeline,
            previews=previews,
            on_progress=self._put if steps else None,
            format_=format_,
        )
        self.ticket.result.add_done_callback(self._drawn)

    def _drawn(self, drawn: Future[Result]) -> None:
        _ANSWERING.submit(lambda: self._answer(drawn.result())).add_done_callback(self._put)

    def _put(self, event: Progress | Future[Answer]) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended, nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """Let go of it."""
        self.ticket.cancel()

    async def events(self) -> AsyncIterator[Progress | Answer]:
        """Its steps, where they were asked for, then the answer; raises what the room raised."""
        while isinstance(event := await self._events.get(), Progress):
            yield event
        yield event.result()

    async def result(self, connection: Connection) -> Answer:
        """The answer; as `while_connected`."""
        try:
            return await while_connected(connection, self._last_event())
        finally:
            self.cancel()

    async def _last_event(self) -> Answer:
        while isinstance(event := await self._events.get(), Progress):
            pass
        return event.result()


def timing_header(result: Result) -> dict[str, str]:
    """What each stage took in all, in ms, as browsers and other clients read it: Server-Timing."""
    totals = result.timings.totals_ms()
    return {"Server-Timing": ", ".join(f"{name};dur={ms:.3f}" for name, ms in totals.items())}
