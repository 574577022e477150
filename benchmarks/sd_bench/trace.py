"""Samples as a picture of time: a Chrome trace, which Perfetto (ui.perfetto.dev) opens.

The format is Google's Trace Event Format: complete events ("X"), microseconds, nested by time.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd_runtime.timing import Timings

_PROCESS, _THREAD = 1, 1


class Trace:
    """Requests one after the other on one line, their stages below them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._requests: list[Timings] = []

    def add(self, timings: Timings) -> None:
        """Append a request that has ended."""
        self._requests.append(timings)

    def to_json(self) -> str:
        """The file's text. Time 0 is the first request's begin."""
        events: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": _PROCESS, "args": {"name": self._name}},
            {
                "name": "thread_name",
                "ph": "M",
                "pid": _PROCESS,
                "tid": _THREAD,
                "args": {"name": "requests"},
            },
        ]
        origin_s = min(
            (began for t in self._requests for spans in t.spans.values() for began, _ in spans),
            default=0.0,
        )
        for index, timings in enumerate(self._requests):
            events += _events(timings, index, origin_s)
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"


def _events(timings: Timings, request: int, origin_s: float) -> list[dict[str, Any]]:
    """One request's events, the enclosing one first."""
    everything = [span for spans in timings.spans.values() for span in spans]
    # "total" is the pipeline's and ends before the PNG, which belongs to the request as well.
    stages = {stage: spans for stage, spans in timings.spans.items() if stage != "total"}
    stages = {
        "request": [(min(began for began, _ in everything), max(ended for _, ended in everything))],
        **stages,
    }
    return [
        {
            "name": stage,
            "cat": "request" if stage == "request" else "stage",
            "ph": "X",
            "ts": 1e6 * (began - origin_s),
            "dur": 1e6 * (ended - began),
            "pid": _PROCESS,
            "tid": _THREAD,
            "args": {"request": request, "run": run},
        }
        for stage, spans in stages.items()
        for run, (began, ended) in enumerate(spans)
    ]
