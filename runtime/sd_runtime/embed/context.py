"""An open bundle as C sees it: its pipeline, its engine room, and what it has counted."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sd_engines.closing import Closing
from sd_runtime.engine_room import EngineRoom
from sd_runtime.pipeline import Pipeline
from sd_runtime.scheduler_check import drawable_bundle
from sd_runtime.scheduler_config import SCHEDULERS
from sd_runtime.task import check_served
from sd_runtime.work_stream import on_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sd_engines.spec import Precision
    from sd_runtime.request import Request
    from sd_runtime.ticket import Progress, Ticket
    from sd_runtime.timing import Timings

QUEUE_SIZE = 16


class Context(Closing):
    """One bundle, one thread that draws, and any number of threads that ask."""

    def __init__(
        self,
        bundle: str,
        *,
        backend: str = "auto",
        precision: Precision | None = None,
        threads: int | None,
        queue_size: int,
        loras: Sequence[str] = (),
        cuda_stream: int = 0,
    ) -> None:
        opened = drawable_bundle(bundle)
        check_served(opened.manifest)
        with on_stream(cuda_stream):
            self._pipeline = Pipeline.load(
                opened, backend=backend, precision=precision, threads=threads, loras=loras
            )
        self._room = EngineRoom(self._pipeline, queue_size=queue_size, on_drawn=self._count_stages)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._runs: Counter[str] = Counter()
        self._total_ms: dict[str, float] = defaultdict(float)

    @property
    def draws_in_this_thread(self) -> bool:
        """Whether who asks is a callback."""
        return self._room.draws_in_this_thread

    def pixels_bytes(self, request: Request) -> int:
        """Bytes of the pictures of ``request``; `ConfigError` for a size that is not drawn."""
        sized = self._pipeline.bundle.manifest.at(request.height, request.width)
        return request.num_images * sized.profile.height * sized.profile.width * 3

    def submit(
        self,
        request: Request,
        *,
        previews: int,
        on_progress: Callable[[Progress], None],
        format_: str | None = None,
    ) -> Ticket:
        """Queue ``request``; raises as `EngineRoom.submit`. ``on_progress`` runs where it draws."""
        ticket = self._room.submit(
            request, previews=previews, on_progress=on_progress, format_=format_
        )
        with self._lock:
            self._counts["submitted"] += 1
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop it: at once where it waits, within a step where it is drawn."""
        self._room.cancel(ticket)

    def count(self, outcome: str, *, images: int = 0) -> None:
        """Note that a job ended: "succeeded", "failed" or "cancelled"."""
        with self._lock:
            self._counts[outcome] += 1
            self._counts["images"] += images

    def _count_stages(self, _tickets: Sequence[Ticket], timings: Timings) -> None:
        with self._lock:
            for name, total_ms in timings.totals_ms().items():
                self._runs[name] += len(timings.runs_ms(name))
                self._total_ms[name] += total_ms

    def info(self) -> dict[str, Any]:
        """What the bundle is, and what it runs on."""
        manifest = self._pipeline.bundle.manifest
        return {
            "model": asdict(manifest.model),
            "profile": asdict(self._pipeline.profile),
            "profiles": [asdict(size.profile) for size in manifest.all_sizes],
            "engines": {name: asdict(entry) for name, entry in self._pipeline.engines.items()},
            "schedulers": sorted(SCHEDULERS),
        }

    def statistics(self) -> dict[str, Any]:
        """Counts since it was opened, and each stage's runs and time."""
        waiting = self._room.waiting
        with self._lock:
            names = ("submitted", "succeeded", "failed", "cancelled", "images")
            return {
                "waiting": waiting,
                **{name: self._counts[name] for name in names},
                "stages": {
                    name: {"runs": self._runs[name], "total_ms": round(total_ms, 3)}
                    for name, total_ms in self._total_ms.items()
                },
            }

    def close(self) -> None:
        """Cancel all, wait for the thread and free the engines."""
        self._room.close()
        self._pipeline.close()
