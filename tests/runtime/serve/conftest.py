"""One real server process for all tests of the doors, and a way to start others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import TinyModel

MAIN = "import sys; from sd_runtime.serve.cli import main; sys.exit(main())"
WAIT_S = 60


@dataclass(frozen=True)
class Reply:
    """An HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """A running ``sd-serve``; ``log`` is its stderr."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(
        self, path: str, body: object = None, *, headers: dict[str, str] | None = None
    ) -> Reply:
        """GET ``path``, or POST ``body`` to it as JSON (bytes as they are)."""
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - our own server
            self.url + path,
            data=data,
            headers={"Content-Type": "application/json", **(headers or {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:  # noqa: S310
                return Reply(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, dict(error.headers), error.read())

    def client(self) -> openai.OpenAI:
        """OpenAI's own, to be closed; it asks once."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def send(
        self, path: str, body: dict[str, Any] | bytes, *, kind: str = "application/json"
    ) -> socket.socket:
        """A connection on which ``body`` was sent to ``path`` and nothing was read."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: {kind}\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over all series that have ``labels``; 0 where there is none yet."""
        families = text_string_to_metric_families(self.ask("/metrics").body.decode())
        samples = (sample for family in families for sample in family.samples)
        return sum(
            sample.value
            for sample in samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def log_line(self, request_id: str) -> dict[str, Any]:
        """What it logs of an answer, and may log after it was sent."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            for text in self.log.read_text().splitlines(keepends=True):
                line = json.loads(text) if text.endswith("\n") else {}
                if line.get("request_id") == request_id and "status" in line:
                    answer: dict[str, Any] = line
                    return answer
            time.sleep(0.01)
        raise AssertionError(f"no answer is logged of {request_id}")


@contextmanager
def running(
    folder: Path, *arguments: object, key: str | None = None, before: str = ""
) -> Iterator[Server]:
    """Start ``sd-serve`` with ``arguments`` on a free port; afterwards end it at once.

    ``before`` is Python that its process runs first.
    """
    environment = {name: value for name, value in os.environ.items() if name != "SD_SERVE_API_KEY"}
    if key is not None:
        environment["SD_SERVE_API_KEY"] = key
    log = folder / "stderr.txt"
    python = [sys.executable, "-W", "error", "-c", before + MAIN]
    command = [*python, *map(str, arguments), "--port", "0"]
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, log.read_text()
        try:
            yield Server(url, process, log)
        finally:
            for _ in range(2):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.05)
            process.wait(WAIT_S)


@pytest.fixture(scope="session")
def server(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """64×64 pictures, two at a time; at most 40 pictures of 40 steps a request; JSON logs."""
    folder = tmp_path_factory.mktemp("server")
    limits = ("--max-images", 40, "--max-steps", 40, "--queue-size", 8)
    with running(
        folder, tiny_model.bundle, "--threads", 1, "--log-format", "json", *limits
    ) as server:
        yield server
    assert "Traceback" not in server.log.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    """`running` in the test's own folder."""
    return partial(running, tmp_path)
