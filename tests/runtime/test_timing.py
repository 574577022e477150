"""Spans are kept by stage, in the order the stages first ran."""

from __future__ import annotations

import time

import pytest

from sd_runtime.timing import Timings, clock


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
