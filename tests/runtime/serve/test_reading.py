"""Pictures that are sent: when they are decoded, and what they cost while they wait."""

from __future__ import annotations

import base64
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from pictures import png, text

from .test_operations import idle, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import TinyModel

    from .conftest import Reply, Server

DRAW = "/sdapi/v1/img2img"
BODY = {"prompt": "a cat", "steps": 2, "init_images": [text(Image.radial_gradient("L"))]}
BROKEN = BODY | {"init_images": ["aGVsbG8="]}
HOLD = """
from pathlib import Path; from sd_runtime.serve.reading import _READING
_READING.submit(Path({!r}).read_bytes)
"""


@pytest.fixture
def held(
    tiny_model: TinyModel, start: Callable[..., Any], tmp_path: Path
) -> Iterator[tuple[Server, Callable[[], None]]]:
    """A server with a queue for two, that decodes nothing until it is let go on."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    before = HOLD.format(str(pipe))
    with start(tiny_model.bundle, "--threads", 1, "--queue-size", 2, before=before) as server:
        yield server, lambda: pipe.write_bytes(b"") and None


def asked_at_once(server: Server, *bodies: dict[str, Any]) -> Callable[[], list[Reply]]:
    """Ask for each of ``bodies`` at the same time; what is returned waits for the replies."""
    pool = ThreadPoolExecutor(len(bodies))
    asked = [pool.submit(server.ask, DRAW, body) for body in bodies]
    pool.shutdown(wait=False)
    return lambda: [reply.result(60) for reply in asked]


def waiting(server: Server) -> int:
    return int(server.ask("/health/ready").json["waiting"])


def test_room_is_asked_before_pictures_are_decoded(
    held: tuple[Server, Callable[[], None]],
) -> None:
    server, go_on = held
    replies = asked_at_once(server, BODY, BROKEN)
    until(lambda: waiting(server) == 2)
    for late in (BODY, BROKEN):
        assert server.ask(DRAW, late).status == 429
    go_on()
    assert sorted(reply.status for reply in replies()) == [200, 400]
    until(lambda: idle(server))
    assert server.ask(DRAW, BODY).status == 200


def test_a_client_that_leaves_before_its_picture_is_decoded_makes_room(
    held: tuple[Server, Callable[[], None]],
) -> None:
    server, go_on = held
    connections = [server.send(DRAW, BODY) for _ in range(2)]
    until(lambda: waiting(server) == 2)
    for connection in connections:
        connection.close()
    until(lambda: waiting(server) == 0)
    go_on()
    assert server.ask(DRAW, BODY).status == 200
    assert server.metric("sd_serve_pictures_total") == 1
    assert server.metric("sd_serve_requests_total", route=DRAW, status="499") == 2


def test_pictures_are_not_decoded_for_a_server_that_ends(
    held: tuple[Server, Callable[[], None]],
) -> None:
    server, go_on = held
    replies = asked_at_once(server, BODY, BROKEN)
    until(lambda: waiting(server) == 2)
    server.process.send_signal(signal.SIGTERM)
    with suppress(URLError, ConnectionError):
        while True:  # until it listens no more
            server.ask("/health/live")
    go_on()
    assert [reply.status for reply in replies()] == [503, 503]
    assert server.process.wait(60) == 0


def test_large_pictures_that_are_sent_at_once_are_not_in_memory_at_once(
    tiny_model: TinyModel, start: Callable[..., Any]
) -> None:
    picture = Image.new("RGB", (4000, 4000))
    body = BODY | {"init_images": [text(picture)]}
    with start(tiny_model.bundle, "--threads", 1) as server:
        assert server.ask(DRAW, BODY).status == 200
        before = memory_bytes(server, "VmHWM")
        replies = asked_at_once(server, *[body] * 8)
        assert [reply.status for reply in replies()] == [200] * 8
        one = 4 * picture.width * picture.height  # as Pillow keeps it
        assert memory_bytes(server, "VmHWM") - before < 6 * one


@pytest.mark.parametrize("form", [False, True])
def test_what_waits_is_no_longer_what_was_sent(
    tiny_model: TinyModel, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, form: bool
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")  # what is freed leaves the process
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    sent = png(Image.fromarray(noise))
    body: dict[str, Any] | bytes = BODY | {"init_images": [base64.b64encode(sent).decode()]}
    path, kind = DRAW, "application/json"
    if form:
        part = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
        image = part.replace(b"\r\n\r\n", b'; filename="a.png"\r\n\r\n') % (b"image", sent)
        body = part % (b"prompt", b"a cat") + image + b"--x--\r\n"
        path, kind = "/v1/images/edits", "multipart/form-data; boundary=x"
    long = {"prompt": "a cat", "num_inference_steps": 999, "n": 200}
    limits = ("--max-images", 200, "--max-steps", 999)
    with start(tiny_model.bundle, "--threads", 1, *limits) as server, ExitStack() as connections:
        assert server.ask(DRAW, BODY).status == 200
        before = memory_bytes(server, "VmRSS")
        connections.enter_context(closing(server.send("/v1/images/generations", long)))
        until(lambda: server.metric("sd_serve_running") == 1)
        for _ in range(8):
            connections.enter_context(closing(server.send(path, body, kind=kind)))
        until(lambda: waiting(server) == 8)
        until(lambda: memory_bytes(server, "VmRSS") - before < 4 * len(sent))


def memory_bytes(server: Server, field: str) -> int:
    """What the server's process has now ("VmRSS"), or had at most ("VmHWM")."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])
