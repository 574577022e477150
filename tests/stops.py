"""Ends an export or a build from its progress, as an interrupt does."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd_export.progress import Progress, StageEvent


class Stop(BaseException):
    """What `stop_at` raises."""


def stop_at(component: str, stage: str, *, events: list[StageEvent] | None = None) -> Progress:
    """Raises `Stop` as the stage begins; ``events`` gets all that comes, it included."""

    def progress(event: StageEvent) -> None:
        if events is not None:
            events.append(event)
        if (event.component, event.stage, event.state) == (component, stage, "started"):
            raise Stop

    return progress
