"""``sd-bench serve``: a real server, loaded for a moment."""

from __future__ import annotations

import json
from time import perf_counter
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pytest

from sd_bench import served
from sd_bench.cli import main
from sd_bench.served import Reply, ServerProcess, body_of, put_under_load
from sd_engines.errors import BackendError
from sd_runtime import Request

if TYPE_CHECKING:
    from pathlib import Path

FAST = ["--threads", "1", "--num-inference-steps", "1", "--rounds", "10", "--seconds", "1"]


def test_a_server_stays_right_under_load(
    shapes_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["serve", str(shapes_bundle), "--backend", "onnxruntime", "--clients", "2"]
    assert main([*arguments, *FAST, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["overhead_ms"]["rounds"] == 10
    for name, clients in (("load", 2), ("overload", 12)):
        load = report[name]
        assert load["clients"] == clients
        assert load["drawn"] > 0
        assert load["wrong"] == load["failed"] == 0
        assert len(load["resident_bytes"]) == 4
    assert report["load"]["refused"] == 0
    assert report["overload"]["refused"] > 0


def test_no_percentile_is_beyond_the_slowest() -> None:
    spread = served._spread([600.0, 620.0, 640.0, 960.0])
    assert spread is not None
    assert 640 < spread["p99"] <= spread["max"] == 960


def test_a_wrong_picture_is_noticed(shapes_bundle: Path, tmp_path: Path) -> None:
    options = ["--backend", "onnxruntime", "--threads", "1"]
    with ServerProcess(
        shapes_bundle, log=tmp_path / "log", queue_size=1, options=options
    ) as server:
        request = Request("a red circle", seed=1, num_inference_steps=1)
        expected = np.full((128, 128, 3), 127, dtype=np.uint8)
        load = put_under_load(server, [request], [expected], clients=1, seconds=0.2)
    assert load.wrong == len(load.drawn_ms) > 0


def test_a_body_has_all_that_a_request_differs_in() -> None:
    """All that `sd-bench serve` has options for: else a right picture would be counted as wrong."""
    request = Request(
        "a red circle",
        negative_prompt="blue",
        seed=3,
        num_inference_steps=9,
        guidance_scale=2.5,
        guidance_start=0.25,
        guidance_stop=0.75,
        cache_interval=2,
        scheduler="ddim",
        eta=0.5,
    )
    assert Request.from_mapping(body_of(request)) == request


def test_a_client_that_waits_holds_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server closes what is idle for 5 s, and a request on that would be counted as lost."""
    connection = Mock()
    server = Mock(connection=lambda: connection, resident_bytes=1)
    idle: list[int] = []

    def refused(connection: Mock, body: dict[str, Any]) -> Reply:
        idle.append(connection.close.call_count)
        return Reply(status=429, ms=1.0, body=b"", stages_ms={}, retry_after_s=0.02)

    monkeypatch.setattr(served, "ask", refused)
    load = put_under_load(server, [Request("a", seed=1)], [], clients=1, seconds=0.2)
    assert len(load.refused_ms) == len(idle) > 1
    assert idle == list(range(len(idle)))


def test_an_interrupt_ends_the_load(
    shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(server: ServerProcess) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(ServerProcess, "resident_bytes", property(interrupt))
    options = ["--backend", "onnxruntime", "--threads", "1"]
    request = Request("a red circle", seed=1, num_inference_steps=1)
    expected = np.zeros((128, 128, 3), dtype=np.uint8)
    with ServerProcess(
        shapes_bundle, log=tmp_path / "log", queue_size=1, options=options
    ) as server:
        start = perf_counter()
        with pytest.raises(KeyboardInterrupt):
            put_under_load(server, [request], [expected], clients=2, seconds=40)
    assert perf_counter() - start < 20, "a quarter of the time, and the answers under way"


@pytest.mark.parametrize("seconds", ["nan", "inf", "0"])
def test_a_load_takes_some_seconds(
    shapes_bundle: Path, capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    assert main(["serve", str(shapes_bundle), "--seconds", seconds]) == 2
    assert "--seconds" in capsys.readouterr().err


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="did not start: Error: "):
        ServerProcess(tmp_path / "none", log=tmp_path / "log", queue_size=1, options=[])
