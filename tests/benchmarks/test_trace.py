"""A trace is what the Trace Event Format says, and holds what was timed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sd_bench.trace import Trace
from sd_runtime.timing import Timings

if TYPE_CHECKING:
    from pathlib import Path


def timings(began: float) -> Timings:
    found = Timings()
    found.add("tokenize", began, began + 0.001)
    for step in range(2):
        found.add("unet", began + 0.01 + step, began + 0.51 + step)
        found.add("scheduler", began + 0.51 + step, began + 0.52 + step)
    found.add("total", began, began + 2)
    found.add("png", began + 2, began + 2.25)
    return found


def events(*requests: Timings) -> list[dict[str, Any]]:
    trace = Trace("a bundle")
    for request in requests:
        trace.add(request)
    document = json.loads(trace.to_json())
    assert document["displayTimeUnit"] in ("ms", "ns"), "the format knows no other"
    return list(document["traceEvents"])


def test_every_span_is_an_event_in_microseconds() -> None:
    complete = [event for event in events(timings(100.0)) if event["ph"] == "X"]
    found = {(e["name"], e["args"]["run"]): (e["ts"], e["dur"]) for e in complete}
    assert found == {
        ("request", 0): (0, pytest.approx(2.25e6)),
        ("tokenize", 0): (0, pytest.approx(1e3)),
        ("unet", 0): (pytest.approx(1e4), pytest.approx(5e5)),
        ("unet", 1): (pytest.approx(1.01e6), pytest.approx(5e5)),
        ("scheduler", 0): (pytest.approx(5.1e5), pytest.approx(1e4)),
        ("scheduler", 1): (pytest.approx(1.51e6), pytest.approx(1e4)),
        ("png", 0): (pytest.approx(2e6), pytest.approx(2.5e5)),
    }


def test_events_nest_on_one_line_with_a_name() -> None:
    found = events(timings(5.0), timings(8.0))
    names = {event["name"]: event["args"]["name"] for event in found if event["ph"] == "M"}
    assert names["process_name"] == "a bundle"
    assert len({event["pid"] for event in found}) == 1
    complete = [event for event in found if event["ph"] == "X"]
    assert len({event["tid"] for event in complete}) == 1
    requests = [event for event in complete if event["name"] == "request"]
    assert [event["args"]["request"] for event in requests] == [0, 1]
    assert requests[1]["ts"] == pytest.approx(3e6)
    for event in complete:
        around = requests[event["args"]["request"]]
        assert around["ts"] <= event["ts"]
        assert event["ts"] + event["dur"] <= around["ts"] + around["dur"] + 1e-3


def test_nothing_timed_is_an_empty_trace() -> None:
    assert [event["ph"] for event in events()] == ["M", "M"]


def test_events_are_of_the_kind_that_torch_writes(tmp_path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(2).sum()
    profile.export_chrome_trace(str(tmp_path / "torch.json"))
    document = json.loads((tmp_path / "torch.json").read_text())
    ours = {event["ph"]: event for event in events(timings(1.0))}
    theirs = {event["ph"]: event for event in document["traceEvents"]}
    assert ours["X"].keys() == theirs["X"].keys()
    assert ours["M"].keys() <= theirs["M"].keys()
    for name, value in ours["X"].items():
        kinds = (int, float) if name in ("ts", "dur", "pid", "tid") else type(theirs["X"][name])
        assert isinstance(value, kinds), name
