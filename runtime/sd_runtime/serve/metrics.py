"""What a server counts, in the form that Prometheus reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from sd_runtime.serve.offer import model_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_runtime.engine_room import EngineRoom
    from sd_runtime.ticket import Ticket
    from sd_runtime.timing import Timings

_STAGE_BUCKETS_S = (0.0005, 0.002, 0.005, 0.02, 0.05, 0.2, 0.5, 2, 5, 20, 60)
_REQUEST_BUCKETS_S = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Metrics:
    """Counters of one server, with a registry of their own. Safe to use from any thread."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "sd_serve_requests", "HTTP answers", ["route", "status"], registry=registry
        )
        self._request_s = Histogram(
            "sd_serve_request_seconds",
            "From a request's head to the end of its answer",
            ["route"],
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._queue_s = Histogram(
            "sd_serve_queue_seconds",
            "What a drawn request waited for its turn, its pictures decoded",
            ["model"],
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._stage_s = Histogram(
            "sd_serve_stage_seconds",
            "One run of a stage; unet once a step, total once a batch",
            ["model", "stage"],
            buckets=_STAGE_BUCKETS_S,
            registry=registry,
        )
        self._pictures = Counter(
            "sd_serve_pictures", "Pictures drawn", ["model"], registry=registry
        )
        self._joined = Counter(
            "sd_serve_joined_requests",
            "Requests that shared a batch",
            ["model"],
            registry=registry,
        )

    def watch(self, room: EngineRoom) -> None:
        """Also tell how full ``room`` is."""
        for name, what, value in (
            ("queue_depth", "Requests that wait", lambda: room.waiting),
            ("queue_size", "Requests that may wait", lambda: room.queue_size),
            ("running", "Requests that are being drawn", lambda: len(room.running)),
            ("ready", "1 while requests are accepted", lambda: int(room.accepting)),
        ):
            Gauge(f"sd_serve_{name}", what, registry=self._registry).set_function(value)

    def count_batch(self, tickets: Sequence[Ticket], timings: Timings) -> None:
        """Note a batch that was drawn, for `EngineRoom`: all of it by one model."""
        model = model_name(tickets[0].pipeline.bundle.path)
        for stage, spans in timings.spans.items():
            observe = self._stage_s.labels(model, stage).observe
            for began, ended in spans:
                observe(ended - began)
        for ticket in tickets:
            waited_s = (ticket.started_s or ticket.accepted_s) - ticket.accepted_s
            self._queue_s.labels(model).observe(waited_s)
            self._pictures.labels(model).inc(ticket.request.num_images)
        if len(tickets) > 1:
            self._joined.labels(model).inc(len(tickets))

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Note an answer. ``route`` is a path's pattern, so that nobody can make up new ones."""
        self._requests.labels(route, str(status)).inc()
        self._request_s.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Everything in Prometheus's text format, 0.0.4."""
        return generate_latest(self._registry)
