"""Spans are kept by stage, in the order the stages first ran."""

from __future__ import annotations

import time

import pytest

from sd_runtime.timing import DeviceClock, Timings, clock


def test_stages_and_their_runs() -> None:
    timings = Timings()
    timings.add("unet", 1.0, 1.25)
    timings.add("scheduler", 1.25, 1.375)
    timings.add("unet", 2.0, 2.5)
    assert timings.spans == {"unet": [(1.0, 1.25), (2.0, 2.5)], "scheduler": [(1.25, 1.375)]}
    assert timings.runs_ms("unet") == [250.0, 500.0]
    assert timings.runs_ms("vae_decoder") == []
    assert timings.totals_ms() == {"unet": 750.0, "scheduler": 125.0}
    assert timings.to_json() == {"unet": 750.0, "scheduler": 125.0, "unet_steps": [250.0, 500.0]}


def test_a_body_is_timed_even_where_it_fails() -> None:
    timings = Timings()
    before = clock()

    @timings.measure("load")
    def fail() -> None:
        time.sleep(0.01)
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    ((began, ended),) = timings.spans["load"]
    assert before <= began
    assert 0.01 <= ended - began <= clock() - before


def test_merging_appends() -> None:
    timings, other = Timings(), Timings()
    timings.add("unet", 1.0, 2.0)
    other.add("unet", 3.0, 4.0)
    other.add("png", 4.0, 5.0)
    timings.merge(other)
    assert timings.spans == {"unet": [(1.0, 2.0), (3.0, 4.0)], "png": [(4.0, 5.0)]}
    assert other.spans["unet"] == [(3.0, 4.0)], "the other keeps its own"


class Gpu:
    """A stand-in for `cupy.cuda` whose device has a clock of its own."""

    def __init__(self) -> None:
        self.time_s = 100.0
        self.waited = 0

    def Event(self) -> Event:  # noqa: N802 - CuPy's name
        return Event(self)

    def get_elapsed_time(self, first: Event, second: Event) -> float:
        return 1e3 * (second.time_s - first.time_s)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.time_s = self.gpu.time_s

    def synchronize(self) -> None:
        self.gpu.waited += 1


def test_a_gpu_says_when_it_came_to_a_moment() -> None:
    gpu = Gpu()
    before = clock()
    timings = Timings(DeviceClock(gpu))
    after = clock()
    assert gpu.waited == 1
    for run_s in (0.25, 0.5):
        gpu.time_s += 1
        began = timings.now()
        gpu.time_s += run_s
        timings.add("unet", began, timings.now())
    with timings.measure("vae_decoder"):
        gpu.time_s += 2
    assert gpu.waited == 1, "nothing waits while pictures are drawn"
    timings.settle()
    assert timings.runs_ms("unet") == pytest.approx([250, 500])
    assert timings.totals_ms() == pytest.approx({"unet": 750, "vae_decoder": 2000})
    began, _ = timings.spans["unet"][0]
    assert before + 1 <= began <= after + 1, "on the clock that all processes share"
    with timings.measure("png"):
        gpu.time_s += 9
    assert timings.runs_ms("png")[0] < 1000, "the host's, once all is settled"


def test_settled_spans_are_merged() -> None:
    gpu, everything = Gpu(), Timings()
    timings = Timings(DeviceClock(gpu))
    with timings.measure("unet"):
        gpu.time_s += 1
    timings.settle()
    everything.merge(timings)
    assert everything.runs_ms("unet") == pytest.approx([1000])
