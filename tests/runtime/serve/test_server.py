"""``sd-serve`` as a process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any
from urllib.error import URLError

import pytest
from PIL import Image

from pictures import picture_of, text
from sd_runtime.serve.cli import main

from .conftest import MAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from http.client import HTTPResponse
    from pathlib import Path

    from conftest import TinyModel

    from .conftest import Server

SHORT = {"prompt": "a cat", "num_inference_steps": 1}
LONG = {"prompt": "a cat", "num_inference_steps": 150, "n": 10}


def test_a_missing_bundle_is_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none"), "--port", "0"]) == 3
    assert "Error: " in capsys.readouterr().err


def test_a_missing_package_is_exit_code_4() -> None:
    without = f"import sys; sys.modules['uvicorn'] = None; {MAIN}"
    done = subprocess.run(
        [sys.executable, "-c", without, "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert "sd-serve needs uvicorn" in done.stderr
    assert 'pip install "sd-toolkit[serve]"' in done.stderr


def test_a_precision_that_the_bundle_lacks(
    tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_model.bundle), "--port", "0", "--precision", "int8"]) == 3
    assert "has no int8 engine of unet" in capsys.readouterr().err


def test_a_port_in_use_is_refused_before_anything_heavy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main([str(tmp_path / "none"), "--port", port]) == 2
    err = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}" in err
    assert "Choose another" in err


def test_a_port_that_another_server_takes_meanwhile_is_refused(tiny_model: TinyModel) -> None:
    everywhere = "0.0.0.0"  # noqa: S104 - for the warning
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((everywhere, 0))
        port = str(other.getsockname()[1])
        command = [sys.executable, "-c", MAIN, str(tiny_model.bundle), "--threads", "1"]
        with subprocess.Popen(
            [*command, "--host", everywhere, "--port", port], stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            assert "may draw" in process.stderr.readline()  # it is bound, and opens its engines
            other.listen()
            err = process.stderr.read()
    assert process.returncode == 2
    assert f"cannot listen on {everywhere}, port {port}" in err
    assert "Choose another" in err


@contextmanager
def accepted(server: Server, body: dict[str, Any]) -> Iterator[HTTPResponse]:
    """A stream whose head has arrived: the request is in the engine room."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request(
            "POST", "/v1/images/generations", json.dumps({**body, "stream": True}), headers
        )
        yield connection.getresponse()
    finally:
        connection.close()


def test_sigterm_finishes_what_was_accepted(
    tiny_model: TinyModel, start: Callable[..., Any]
) -> None:
    with start(tiny_model.bundle, "--threads", 1) as server:
        with accepted(server, LONG) as stream:
            server.process.send_signal(signal.SIGTERM)
            while server.ask("/health/ready").status == 200:  # a signal takes its time
                pass
            late = server.ask("/v1/images/generations", SHORT)
            assert late.status == 503
            assert late.json["error"]["code"] == "shutting_down"
            assert stream.read().count(b"event: image_generation.completed") == 10
        assert server.process.wait(60) == 0


def test_a_terminal_that_is_closed_finishes_what_was_accepted(
    tiny_model: TinyModel, start: Callable[..., Any]
) -> None:
    terminal = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    with start(tiny_model.bundle, "--threads", 1, before=terminal) as server:
        with accepted(server, LONG) as stream:
            for _ in range(2):  # the terminal's own, and the shell's
                server.process.send_signal(signal.SIGHUP)
                time.sleep(0.05)
            assert stream.read().count(b"event: image_generation.completed") == 10
        assert server.process.wait(60) == 0


def test_under_nohup_a_terminal_may_be_closed(
    tiny_model: TinyModel, start: Callable[..., Any]
) -> None:
    nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    with start(tiny_model.bundle, "--threads", 1, before=nohup) as server:
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.3)  # it looks for signals every 0.1 s
        assert server.ask("/health/ready").status == 200


def test_a_second_signal_cancels(tiny_model: TinyModel, start: Callable[..., Any]) -> None:
    with start(tiny_model.bundle, "--threads", 1) as server:
        with accepted(server, LONG) as stream:
            for _ in range(2):
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.05)  # two of a kind at once are one
            assert b'"code": "cancelled"' in stream.read()
        assert server.process.wait(60) == 143


def test_an_answer_that_is_made_too_late_is_no_error(
    tiny_model: TinyModel, start: Callable[..., Any], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    slow = f"from pathlib import Path; wait = Path({str(pipe)!r}).read_bytes; "
    slow += "from PIL import Image; Image.Image.save = lambda *_, **__: wait(); "
    with start(tiny_model.bundle, "--threads", 1, before=slow) as server:
        with accepted(server, SHORT):
            while server.metric("sd_serve_pictures_total") == 0:
                pass
        server.process.send_signal(signal.SIGTERM)
        with suppress(URLError, ConnectionError):
            while True:  # until it listens no more
                server.ask("/health/ready")
        time.sleep(0.5)  # and has closed the rest
        pipe.write_bytes(b"")
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.log.read_text()


def test_a_second_signal_leaves_a_client_that_is_slow(
    tiny_model: TinyModel, start: Callable[..., Any]
) -> None:
    with (
        start(tiny_model.bundle, "--threads", 1) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection,
    ):
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n"
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert b" 100 " in connection.recv(4096)  # it waits for the body
        server.process.send_signal(signal.SIGTERM)
        with suppress(URLError, ConnectionError):
            while True:  # until it listens no more
                server.ask("/health/ready")
        server.process.send_signal(signal.SIGTERM)
        with suppress(ConnectionError):
            assert connection.recv(4096) == b""  # no 408 after half a minute
        assert server.process.wait(60) == 143
        assert "Traceback" not in server.log.read_text()


def test_a_bundle_for_inpainting_is_served(
    inpainting_model: TinyModel, start: Callable[..., Any]
) -> None:
    with start(inpainting_model.bundle, "--threads", 1) as server:
        (model,) = server.ask("/v1/models").json["data"]
        assert model["tasks"] == ["inpainting"]
        assert "ddim" in model["schedulers"]
        reply = server.ask("/v1/images/generations", SHORT)
        assert reply.status == 400
        assert "picture and a mask" in reply.json["error"]["message"]


def test_a_bundle_for_depth_is_served(depth_model: TinyModel, start: Callable[..., Any]) -> None:
    picture = text(Image.radial_gradient("L"))
    body = {"prompt": "a cat", "steps": 2, "init_images": [picture]}
    with start(depth_model.bundle, "--threads", 1) as server:
        (model,) = server.ask("/v1/models").json["data"]
        assert model["tasks"] == ["depth-to-image"]
        reply = server.ask("/v1/images/generations", SHORT)
        assert reply.status == 400
        assert "it takes a picture" in reply.json["error"]["message"]
        assert len(server.ask("/sdapi/v1/img2img", body).json["images"]) == 1
        assert server.ask("/sdapi/v1/img2img", {**body, "mask": picture}).status == 400


def test_a_bundle_for_variations_is_refused(
    variation_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(variation_model.bundle), "--port", "0"]) == 2
    assert "draws variations of a picture" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers, of numpy
def test_a_bundle_of_several_sizes(sized_model: TinyModel, start: Callable[..., Any]) -> None:
    with start(sized_model.bundle, "--threads", 1) as server:
        (model,) = server.ask("/v1/models").json["data"]
        assert (model["width"], model["height"]) == (40, 16)
        assert model["sizes"] == ["40x16", "16x24"]
        for asked, size in ((None, (40, 16)), ("16x24", (16, 24)), ("40x16", (40, 16))):
            answer = server.ask("/v1/images/generations", {**SHORT, "size": asked, "seed": 1}).json
            (data,) = answer["data"]
            assert answer["size"] == "{}x{}".format(*size)
            assert picture_of(data["b64_json"]).size == size
        body = {"prompt": "a cat", "steps": 1, "width": 16, "height": 24}
        answer = server.ask("/sdapi/v1/txt2img", body).json
        info = json.loads(answer["info"])
        assert (info["width"], info["height"]) == (16, 24)
        late = server.ask("/v1/images/generations", {**SHORT, "size": "24x24"})
        assert late.status == 400
        assert "draws 16×40, 24×16" in late.json["error"]["message"]
