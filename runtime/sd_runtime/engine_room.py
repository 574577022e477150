"""The engine room: one thread that draws, and a bounded queue before it.

It knows nothing of HTTP. Every door brings its requests here, and nothing else draws.
"""

from __future__ import annotations

import math
import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from sd_engines.closing import Closing
from sd_runtime.batch import join_requests, settings_of, split_result
from sd_runtime.file_room import check_files
from sd_runtime.plan import plan
from sd_runtime.refusal import cancelled_error, draining_error, full_error
from sd_runtime.ticket import Progress, Ticket, request_id
from sd_runtime.timing import clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sd_runtime.pipeline import Pipeline
    from sd_runtime.request import Request
    from sd_runtime.result import Result, Step
    from sd_runtime.timing import Timings


class EngineRoom(Closing):
    """Draws one batch at a time, first come, first served. Safe to use from any thread.

    Requests of the same settings that wait at the same moment share a batch where the bundle was
    built for more than one picture a call. ``on_drawn`` gets every batch and its timings, in the
    thread that draws. ``pipeline`` draws what is not submitted for another one; all of them stay
    the caller's, who closes them after the room.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        queue_size: int = 16,
        on_drawn: Callable[[Sequence[Ticket], Timings], None] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.queue_size = queue_size
        self._on_drawn = on_drawn
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []
        self._kept_places = 0
        self._running: list[Ticket] = []
        self._draining = False
        self._mean_s = 1.0  # of one batch, recent ones weigh most
        self._worker = threading.Thread(target=self._work, name="engine-room")
        self._worker.start()

    def submit(
        self,
        request: Request,
        *,
        pipeline: Pipeline | None = None,
        previews: int = 0,
        on_progress: Callable[[Progress], None] | None = None,
        format_: str | None = None,
    ) -> Ticket:
        """Accept ``request``, or refuse it at once. ``pipeline`` None: the room's own.

        ``format_`` is that of the files which are made of its pictures, where that is known.
        Raises `ConfigError` for what the bundle cannot draw or a file not hold, `RefusedError` with
        status 429 where the queue is full and 503 once the room is draining.
        """
        with self._changed:
            self._check_room()  # before the work of checking the request
        pipeline = pipeline or self.pipeline
        manifest = pipeline.bundle.manifest
        planned = plan(request, manifest)
        planned = replace(planned, request=planned.request.seeded())
        if format_ is not None:
            check_files(planned, manifest, format_, loras=pipeline.loras)
        ticket = Ticket(planned.request, pipeline, previews=previews, on_progress=on_progress)
        with self._changed:
            self._check_room()
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    @contextmanager
    def kept_place(self) -> Iterator[None]:
        """Keep a place in the queue for a request whose pictures are still to be read.

        It is free again afterwards: submit the request then. Raises `RefusedError` as `submit`.
        """
        with self._changed:
            self._check_room()
            self._kept_places += 1
        try:
            yield
        finally:
            with self._changed:
                self._kept_places -= 1

    @property
    def waiting(self) -> int:
        """How many requests wait, those for which a place is kept among them."""
        with self._changed:
            return self._kept_places + sum(not ticket.cancelled for ticket in self._waiting)

    @property
    def running(self) -> Sequence[Ticket]:
        """The tickets of the batch that is being drawn, without those that were let go of."""
        return tuple(ticket for ticket in self._running if not ticket.result.done())

    @property
    def accepting(self) -> bool:
        """Whether requests are accepted at all."""
        return not self._draining

    @property
    def finished(self) -> bool:
        """Whether the room was drained and its thread has ended."""
        return not self._worker.is_alive()

    @property
    def draws_in_this_thread(self) -> bool:
        """Whether the caller is the room's own thread, in which `close` would wait for itself."""
        return threading.get_ident() == self._worker.ident

    def cancel(self, ticket: Ticket) -> None:
        """Cancel one: at once where it waits, after the step it is in where it is being drawn."""
        ticket.cancel()
        with self._changed:
            self._drop_cancelled()

    def interrupt(self) -> None:
        """Cancel what is being drawn; those that wait come next."""
        for ticket in self.running:
            ticket.cancel()

    def drain(self) -> None:
        """Accept no more; what was accepted is drawn. Returns at once."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def cancel_all(self) -> None:
        """Cancel what is being drawn and what waits."""
        with self._changed:
            for ticket in (*self._running, *self._waiting):
                ticket.cancel()

    def close(self) -> None:
        """Drain, cancel everything, and wait for the thread to end: one step at most."""
        self.drain()
        self.cancel_all()
        self._worker.join()

    def _work(self) -> None:
        while tickets := self._next():
            start = clock()
            self._draw(tickets)
            self._mean_s += 0.2 * (clock() - start - self._mean_s)

    def _next(self) -> list[Ticket]:
        """Who is drawn next: the first that waits, and whoever fits into its batch.

        Empty once the room is drained.
        """
        with self._changed:
            self._running = []
            while True:
                self._drop_cancelled()
                if self._waiting:
                    break
                if self._draining:
                    return []
                self._changed.wait()
            first, *others = self._waiting
            settings, taken = settings_of(first.request), [first]
            left = first.pipeline.profile.batch_size - first.request.num_images
            for ticket in others:
                if ticket.pipeline is not first.pipeline:
                    continue
                if ticket.request.num_images <= left and settings_of(ticket.request) == settings:
                    left -= ticket.request.num_images
                    taken.append(ticket)
            self._waiting = [ticket for ticket in self._waiting if ticket not in taken]
            self._running = taken
        for ticket in taken:
            ticket.started_s = clock()
        return taken

    def _check_room(self) -> None:
        if self._draining:
            raise draining_error()
        self._drop_cancelled()
        waiting = len(self._waiting) + self._kept_places
        if waiting >= self.queue_size:
            retry_after_s = max(1, math.ceil(self._mean_s))
            raise full_error(waiting=waiting, retry_after_s=retry_after_s)

    def _drop_cancelled(self) -> None:
        left = [ticket for ticket in self._waiting if ticket.cancelled]
        self._waiting = [ticket for ticket in self._waiting if not ticket.cancelled]
        for ticket in left:
            ticket.result.set_exception(cancelled_error())

    def _draw(self, tickets: Sequence[Ticket]) -> None:
        """Draw ``tickets`` as one batch; afterwards each has its result or an error."""
        request_id.set(",".join(filter(None, (ticket.request_id for ticket in tickets))))
        try:
            result = self._drawn(tickets)
            if result is None:
                return
            parts = split_result(result, [ticket.request for ticket in tickets])
            if self._on_drawn is not None:
                self._on_drawn(_left(tickets), result.timings)
        except Exception as error:
            if len(tickets) > 1:
                # One picture must not spoil its neighbours': whose fault it is shows alone.
                for ticket in _left(tickets):
                    self._draw([ticket])
                return
            tickets[0].result.set_exception(error)
            return
        for ticket, part in zip(tickets, parts, strict=True):
            if not ticket.result.done():
                ticket.result.set_result(part)

    def _drawn(self, tickets: Sequence[Ticket]) -> Result | None:
        """What ``tickets`` come to; None once all of them are cancelled, which ends each."""
        _end_cancelled(tickets)
        if not _left(tickets):
            return None
        request = join_requests([ticket.request for ticket in tickets])
        with closing(tickets[0].pipeline.stream(request)) as steps:
            for step in steps:
                _report(step, tickets)
                _end_cancelled(tickets)
                if not _left(tickets):
                    return None
                if step.result is not None:
                    return step.result
        raise AssertionError("the last step holds the result")


def _left(tickets: Sequence[Ticket]) -> list[Ticket]:
    return [ticket for ticket in tickets if not ticket.result.done()]


def _end_cancelled(tickets: Sequence[Ticket]) -> None:
    """Tell those that were cancelled; the batch keeps their rows for as long as others are left."""
    for ticket in _left(tickets):
        if ticket.cancelled:
            ticket.result.set_exception(cancelled_error())


def _report(step: Step, tickets: Sequence[Ticket]) -> None:
    """Tell each ticket of ``step``; only one that is drawn alone may run in several batches."""
    wanted = [
        not ticket.cancelled and ticket.wants_preview(step.index, step.num_steps)
        for ticket in tickets
    ]
    pictures = step.preview() if any(wanted) else None
    first = 0
    for ticket, wants in zip(tickets, wanted, strict=True):
        own = slice(first, first + ticket.request.num_images)
        first = own.stop
        preview = pictures[own] if wants and pictures is not None else None
        if not ticket.cancelled:
            ticket.report(Progress(step.index, step.num_steps, step.first_image, preview))
