"""What operators rely on: health, metrics, logs, the key, and clients that misbehave."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import threading
import time
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from pictures import text
from sd_engines.errors import ConfigError
from sd_runtime.serve.api_key import load_api_key
from sd_runtime.serve.offer import MAX_BODY_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import TinyModel

    from .conftest import Reply, Server

DRAW = "/v1/images/generations"
SHORT = {"prompt": "a cat", "seed": 1, "num_inference_steps": 2}
LONG = SHORT | {"num_inference_steps": 40, "n": 40}


def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens soon, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def idle(server: Server) -> bool:
    return server.metric("sd_serve_running") + server.metric("sd_serve_queue_depth") == 0


def test_health_and_metrics(server: Server) -> None:
    assert server.ask("/health/live").json == {"live": True}
    assert server.ask("/health/ready").json == {"ready": True, "waiting": 0}
    before = server.metric("sd_serve_pictures_total")
    runs = server.metric("sd_serve_stage_seconds_count", stage="unet")
    assert server.ask(DRAW, SHORT | {"scheduler": "ddim"}).status == 200
    assert server.metric("sd_serve_pictures_total") == before + 1
    assert server.metric("sd_serve_stage_seconds_count", stage="unet") == runs + 2
    assert server.metric("sd_serve_requests_total", route=DRAW, status="200") >= 1
    server.ask("/no/such/path")
    assert server.metric("sd_serve_requests_total", route="other", status="404") >= 1
    assert server.metric("process_resident_memory_bytes") > 1e6


@pytest.mark.parametrize("path", ["/", "/health/live", "/health/ready", "/metrics"])
def test_head_is_answered_as_load_balancers_ask(server: Server, path: str) -> None:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("HEAD", path)
    answer = connection.getresponse()
    own = server.ask(path)
    assert (answer.status, answer.read()) == (200, b"")
    assert answer.getheader("content-type") == own.headers["content-type"]
    assert int(answer.getheader("content-length") or 0) > 0
    connection.request("HEAD", "/health/live")  # on the same connection: nothing is left in it
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_drawing(server: Server, stream: bool) -> None:
    pictures = server.metric("sd_serve_pictures_total")
    connection = server.send(DRAW, LONG | {"stream": stream})
    until(lambda: server.metric("sd_serve_running") == 1)
    connection.close()
    until(lambda: idle(server))
    assert server.metric("sd_serve_pictures_total") == pictures


def test_a_full_queue_answers_429_and_clients_that_leave_make_room(server: Server) -> None:
    connections = [server.send(DRAW, LONG)]
    until(lambda: server.metric("sd_serve_running") == 1)
    connections += [server.send(DRAW, LONG) for _ in range(8)]
    until(lambda: server.metric("sd_serve_queue_depth") == 8)
    reply = server.ask(DRAW, SHORT)
    assert reply.status == 429
    assert reply.json["error"]["type"] == "rate_limit_error"
    assert int(reply.headers["retry-after"]) >= 1
    assert server.ask("/health/ready").status == 200
    for connection in connections:
        connection.close()
    until(lambda: idle(server))
    assert server.ask(DRAW, SHORT).status == 200


def test_requests_that_wait_together_share_a_batch(server: Server) -> None:
    joined = server.metric("sd_serve_joined_requests_total")
    alone = server.ask(DRAW, SHORT).json["data"][0]["recipe"]
    blocker = server.send(DRAW, LONG)
    until(lambda: server.metric("sd_serve_running") == 1)
    replies: list[Reply] = []
    threads = [
        threading.Thread(
            target=lambda seed=seed: replies.append(server.ask(DRAW, SHORT | {"seed": seed}))
        )
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    until(lambda: server.metric("sd_serve_queue_depth") == 2)
    blocker.close()
    for thread in threads:
        thread.join(60)
    recipes = [reply.json["data"][0]["recipe"] for reply in replies]
    assert alone in recipes
    assert server.metric("sd_serve_joined_requests_total") == joined + 2


@pytest.mark.parametrize(("site", "status"), [("cross-site", 403), ("same-origin", 200)])
def test_pages_of_other_sites_interrupt_nobody(server: Server, site: str, status: int) -> None:
    """A browser would send it for them, with the key that it knows."""
    reply = server.ask("/sdapi/v1/interrupt", b"", headers={"Sec-Fetch-Site": site})
    assert reply.status == status
    assert server.ask("/v1/models", headers={"Sec-Fetch-Site": site}).status == 200


def test_a_body_that_is_too_large_is_not_read(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST {DRAW} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(4096).partition(b"\r\n")[0]
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        chunk = b"%x\r\n%s\r\n" % (2**20, b" " * 2**20)
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        connection.sendall(chunk * (MAX_BODY_BYTES // 2**20))
        connection.sendall(b"1\r\n \r\n")
        assert b" 413 " in connection.recv(4096).partition(b"\r\n")[0]


def test_every_answer_has_an_id_that_its_log_lines_share(server: Server) -> None:
    own = server.ask(DRAW, SHORT, headers={"X-Request-Id": "order-66"})
    assert own.headers["x-request-id"] == "order-66"
    forged = server.ask("/nowhere%0Aforged", headers={"X-Request-Id": "a b\tc"})
    assert forged.status == 404
    assert forged.headers["x-request-id"].isalnum()
    line = server.log_line("order-66")
    assert (line["method"], line["path"], line["status"]) == ("POST", DRAW, 200)
    assert line["duration_ms"] > 0
    assert server.log_line(forged.headers["x-request-id"])["path"] == "/nowhere%0Aforged"
    assert "a cat" not in server.log.read_text()


def test_what_is_logged_while_drawing_has_the_ids_of_those_who_asked(
    tiny_model: TinyModel, start: Callable[..., Any]
) -> None:
    long = SHORT | {"prompt": "a dog " * 60}
    with start(tiny_model.bundle, "--threads", 1, "--log-format", "json") as server:
        server.ask(DRAW, long, headers={"X-Request-Id": "alone"})
        with server.send(DRAW, SHORT | {"num_inference_steps": 150, "n": 10}):
            until(lambda: server.metric("sd_serve_running") == 1)
            threads = [
                threading.Thread(
                    target=server.ask,
                    args=(DRAW, long | {"prompt": f"a {name} " * 60}),
                    kwargs={"headers": {"X-Request-Id": name}},
                )
                for name in ("cat", "hen")
            ]
            for thread in threads:
                thread.start()
            until(lambda: server.metric("sd_serve_queue_depth") == 2)
        for thread in threads:
            thread.join(60)
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    ids = [line["request_id"] for line in lines if "longer than" in line["message"]]
    assert ids[0] == "alone"
    assert [sorted(own.split(",")) for own in ids[1:]] == [["cat", "hen"]] * 2


def test_the_log_says_why_an_engine_failed(
    tiny_model: TinyModel, start: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_model.bundle, tmp_path / "tiny.bundle")
    body = {"prompt": "a cat", "init_images": [text(Image.new("RGB", (64, 64)))], "steps": 2}
    with start(bundle, "--threads", 1, "--log-format", "json") as server:
        (bundle / "vae_encoder" / "model.onnx").unlink()  # opened with the first request for it
        reply = server.ask("/sdapi/v1/img2img", body, headers={"X-Request-Id": "order-66"})
        assert (reply.status, reply.json["error"]) == (500, "engine_failed")
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    (line,) = [line for line in lines if line["level"] == "error"]
    assert line["request_id"] == "order-66"
    assert "model.onnx: is missing" in line["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_in_the_drawing_is_logged_once(
    tiny_model: TinyModel, start: Callable[..., Any], stream: bool
) -> None:
    bug = "from sd_runtime import painter; painter.begin = None; "
    body = {"prompt": "a cat", "num_inference_steps": 2, "stream": stream}
    headers = {"X-Request-Id": "order-66"}
    with start(tiny_model.bundle, "--threads", 1, "--log-format", "json", before=bug) as server:
        reply = server.ask("/v1/images/generations", body, headers=headers)
        assert b"internal_error" in reply.body
        server.log_line("order-66")
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    (line,) = [line for line in lines if line["level"] == "error"]
    assert line["request_id"] == "order-66"
    assert "sd_runtime/painter.py" in line["traceback"]


def test_every_line_of_the_log_is_an_object(
    tiny_model: TinyModel, start: Callable[..., Any]
) -> None:
    warned = "import warnings; warnings.simplefilter('default'); "
    with start(tiny_model.bundle, "--log-format", "json", before=warned) as server:
        image = text(Image.new("1", (9600, 9600)))  # so large that Pillow warns of it
        assert server.ask("/sdapi/v1/png-info", {"image": image}).status == 400
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert any("DecompressionBombWarning" in line["message"] for line in lines)


def test_without_the_key_nobody_draws(tiny_model: TinyModel, start: Callable[..., Any]) -> None:
    def basic(pair: str) -> str:
        return "Basic " + base64.b64encode(pair.encode()).decode()

    with start(tiny_model.bundle, "--threads", 1, key="open sesame") as server:
        for path in (DRAW, "/v1/models", "/sdapi/v1/options", "/metrics", "/openapi.json"):
            reply = server.ask(path)
            assert reply.status == 401, path
            assert "WWW-Authenticate" in {
                name.title().replace("Www", "WWW") for name in reply.headers
            }
        for wrong in (
            "open sesame",
            "Bearer",
            "Bearer open",
            "Basic !",
            basic("open sesame"),
            basic("open sesame:"),
            "Bearer öpen",
        ):
            headers = {"Authorization": wrong}
            assert server.ask("/v1/models", headers=headers).status == 401, wrong
        for right in ("Bearer open sesame", basic("anybody:open sesame")):
            assert server.ask("/v1/models", headers={"Authorization": right}).status == 200
        assert server.ask("/health/live").status == 200
        assert server.ask("/health/ready").status == 200


def test_the_key_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SD_SERVE_API_KEY", raising=False)
    assert load_api_key(None) is None
    monkeypatch.setenv("SD_SERVE_API_KEY", "of the environment")
    assert load_api_key(None) == "of the environment"
    file = tmp_path / "key"
    file.write_text("of a file\n")
    assert load_api_key(file) == "of a file"
    for wrong in ("", " \n", "schlüssel"):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match="empty or no plain ASCII"):
            load_api_key(file)
    with pytest.raises(ConfigError, match="cannot read the API key"):
        load_api_key(tmp_path / "none")
