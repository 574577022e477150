"""What an export says of itself while it runs: one event when a stage starts, one when it ends."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from sd_engines.errors import BackendError, EngineMismatchError
from sd_engines.memory import peak_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True)
class StageEvent:
    """A stage of one component started, ended, or was found done.

    ``bytes`` is what the stage read or wrote, ``peak_bytes`` the most memory the process held up
    to its end, ``detail`` words for people.
    """

    component: str
    stage: str
    state: Literal["started", "done", "skipped"]
    seconds: float = 0.0
    bytes: int = 0
    peak_bytes: int = 0
    detail: str = ""


Progress: TypeAlias = Callable[[StageEvent], None]


def silent(event: StageEvent) -> None:
    """Report nothing."""
    del event


class StageResult:
    """What a running stage fills in for the event that ends it."""

    def __init__(self) -> None:
        self.bytes = 0
        self.detail = ""


class StageLog:
    """Passes events on and keeps those that ended, for the bundle's record of its making."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._about = ""
        self.ended: list[StageEvent] = []

    def about(self, words: str) -> StageLog:
        """The same log, for stages whose details begin with ``words``."""
        other = copy.copy(self)
        other._about = words
        return other

    @contextmanager
    def stage(self, component: str, stage: str) -> Iterator[StageResult]:
        """Time the block; a block that raises ends without an event."""
        self._progress(StageEvent(component=component, stage=stage, state="started"))
        begin = time.perf_counter()
        result = StageResult()
        yield result
        self._end(
            StageEvent(
                component=component,
                stage=stage,
                state="done",
                seconds=time.perf_counter() - begin,
                bytes=result.bytes,
                peak_bytes=peak_memory_bytes(),
                detail=result.detail,
            )
        )

    def skipped(self, component: str, stage: str, *, size: int = 0, detail: str = "") -> None:
        """Report a stage whose result an earlier run left ready."""
        self._end(
            StageEvent(component=component, stage=stage, state="skipped", bytes=size, detail=detail)
        )

    @contextmanager
    def skipped_if_unable(self, component: str, stage: str, *, must: bool) -> Iterator[None]:
        """Report the block's stage as skipped where this machine cannot run what it measures.

        What ``must`` run raises its error.
        """
        try:
            yield
        except (BackendError, EngineMismatchError) as error:
            if must:
                raise
            self.skipped(component, stage, detail=f"cannot run here: {error.message}")

    def _end(self, event: StageEvent) -> None:
        event = replace(event, detail=f"{self._about} {event.detail}".strip())
        self.ended.append(event)
        self._progress(event)
