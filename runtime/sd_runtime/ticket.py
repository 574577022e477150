"""One accepted request: what its owner sees of it while it waits and is drawn."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sd_runtime.timing import clock

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from sd_runtime.pipeline import Pipeline
    from sd_runtime.request import Request
    from sd_runtime.result import Result

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that is being answered, for every line it logs; of a batch all, by commas.

Empty where requests have none."""


@dataclass(frozen=True)
class Progress:
    """One UNet call of a ticket's drawing: ``index`` counts 0 … num_steps − 1.

    ``preview`` uint8 [n, H, W, 3], where one is due, shows the pictures from ``first_image`` on
    that are being drawn.
    """

    index: int
    num_steps: int
    first_image: int
    preview: NDArray[np.uint8] | None


class Ticket:
    """The owner's end of a request that ``pipeline`` is to draw. Safe to use from any thread.

    ``result`` gets the `Result`, or the error; its callbacks and ``on_progress`` run in the thread
    that draws, so they must be short. ``previews`` of them are made on the way, evenly spread.
    """

    def __init__(
        self,
        request: Request,
        pipeline: Pipeline,
        *,
        previews: int = 0,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.request = request
        self.pipeline = pipeline
        self.request_id = request_id.get()
        self.result: Future[Result] = Future()
        self.accepted_s = clock()
        self.started_s: float | None = None
        self.progress: Progress | None = None
        self.latest_preview: NDArray[np.uint8] | None = None
        self._previews = previews
        self._on_progress = on_progress
        self._cancelled = threading.Event()
        self._preview_wanted = threading.Event()

    def cancel(self) -> None:
        """Let go of it: it leaves the queue, or its drawing stops after the step it is in."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether its owner, or an interrupt, let go of it."""
        return self._cancelled.is_set()

    def want_preview(self) -> None:
        """Have ``latest_preview`` made after the step it is in."""
        self._preview_wanted.set()

    def wants_preview(self, index: int, num_steps: int) -> bool:
        """Whether a preview is due after step ``index``. The last step has the picture itself."""
        if index + 1 == num_steps:
            return False
        return self._is_due(index, num_steps) or self._preview_wanted.is_set()

    def _is_due(self, index: int, num_steps: int) -> bool:
        """Whether one of the previews that are evenly spread is."""
        parts = self._previews + 1
        first = -(-(index + 1) * parts // num_steps)  # that is not due before this step
        return first < parts and num_steps * first // parts == index + 1

    def report(self, progress: Progress) -> None:
        """Note a step and tell the owner of it; a preview that was only wanted is noted alone."""
        if progress.preview is not None:
            self.latest_preview = progress.preview
            self._preview_wanted.clear()
            if not self._is_due(progress.index, progress.num_steps):
                progress = replace(progress, preview=None)
        self.progress = progress
        if self._on_progress is not None:
            self._on_progress(progress)
