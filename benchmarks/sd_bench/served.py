"""``sd-serve`` under load: whether pictures stay right, refusals quick and memory flat."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from itertools import count
from random import Random
from statistics import median, quantiles
from threading import Event
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from sd_bench.gpu_memory import held_on_gpus_bytes
from sd_bench.killable import Killable
from sd_engines.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from sd_runtime import Request

_MAIN = "import sys; from sd_runtime.serve.cli import main; sys.exit(main())"
_DRAW = "/v1/images/generations"
_LOST_PAUSE_S = 1.0
"""What a client waits that got no answer at all: the server may be gone."""


@dataclass(frozen=True)
class Reply:
    """One answer: its HTTP status, the time from the first byte out to the last one in.

    ``retry_after_s`` is what a refused client is asked to wait, 0 of all others.
    """

    status: int
    ms: float
    body: bytes
    stages_ms: dict[str, float]
    retry_after_s: float


class ServerProcess(Killable):
    """``sd-serve`` on a free port of this machine, in a process of its own."""

    def __init__(self, bundle: Path, *, log: Path, queue_size: int, options: Sequence[str]) -> None:
        """Start it; ``log`` takes its stderr. Raises `BackendError` where it does not start."""
        command = [sys.executable, "-P", "-c", _MAIN, str(bundle), "--port", "0"]
        command += ["--queue-size", str(queue_size), *options]
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)  # noqa: S603
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        try:
            url = self._process.stdout.readline().decode().strip()
        except BaseException:  # an interrupt: nobody has what would be closed
            self.kill()
            raise
        if not url:
            self.close()
            words = log.read_text(errors="replace").strip()
            raise BackendError(
                f"sd-serve did not start: {words[-500:]}", f"Try it alone: sd-serve {bundle}."
            )
        self._port = urlsplit(url).port

    def connection(self) -> HTTPConnection:
        """A connection of its own for one client."""
        return HTTPConnection("127.0.0.1", self._port, timeout=600)

    @property
    def resident_bytes(self) -> int:
        """Its memory now, as its own metrics tell."""
        connection = self.connection()
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        lines = (line.split() for line in text.splitlines())
        values = dict(line for line in lines if len(line) == 2)
        return int(float(values["process_resident_memory_bytes"]))

    def close(self) -> None:
        """End it, once it has drawn what it accepted."""
        self._process.terminate()
        self._process.communicate()

    def kill(self) -> None:
        """End it now: nobody waits for the pictures that it has accepted."""
        self._process.kill()
        self.close()


def body_of(request: Request) -> dict[str, Any]:
    """``request``, of one picture, for OpenAI's door."""
    drawing = ("prompt", "negative_prompt", "seed", "num_inference_steps", "scheduler", "eta")
    guidance = ("guidance_scale", "guidance_start", "guidance_stop", "cache_interval")
    return {name: getattr(request, name) for name in (*drawing, *guidance)}


def ask(connection: HTTPConnection, body: dict[str, Any]) -> Reply:
    """Draw ``body``."""
    start = perf_counter()
    connection.request("POST", _DRAW, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    data = response.read()
    ms = 1e3 * (perf_counter() - start)
    stages = re.findall(r"(\w+);dur=([0-9.]+)", response.headers.get("Server-Timing", ""))
    return Reply(
        status=response.status,
        ms=ms,
        body=data,
        stages_ms={stage: float(took) for stage, took in stages},
        retry_after_s=float(response.headers.get("Retry-After", 0)),
    )


def overhead_ms(server: ServerProcess, request: Request, *, rounds: int) -> list[float]:
    """What HTTP adds to a pipeline's call and the PNG, one figure a round.

    Both are taken from the same answer, whose Server-Timing says what the drawing took.
    """
    connection, body, added = server.connection(), body_of(request), []
    for number in range(-3, rounds):  # the first three warm up
        reply = ask(connection, body)
        if number >= 0:
            added.append(reply.ms - reply.stages_ms["total"] - reply.stages_ms["png"])
    connection.close()
    return added


@dataclass(frozen=True)
class Load:
    """What ``clients`` saw in ``seconds``; ``wrong`` pictures differ from their solo run by > 1.

    After each quarter of the time: what the server held in RAM, and all processes on GPUs.
    """

    clients: int
    seconds: float
    drawn_ms: tuple[float, ...]
    refused_ms: tuple[float, ...]
    wrong: int
    differing: int
    failed: int
    resident_bytes: tuple[int, ...]
    gpu_bytes: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Its figures, times in ms."""
        return {
            "clients": self.clients,
            "seconds": round(self.seconds, 1),
            "drawn": len(self.drawn_ms),
            "drawn_ms": _spread(self.drawn_ms),
            "refused": len(self.refused_ms),
            "refused_ms": _spread(self.refused_ms),
            "wrong": self.wrong,
            "differing_by_1": self.differing,
            "failed": self.failed,
            "resident_bytes": self.resident_bytes,
            "gpu_bytes": self.gpu_bytes,
        }


def put_under_load(
    server: ServerProcess,
    requests: Sequence[Request],
    expected: Sequence[NDArray[np.uint8]],
    *,
    clients: int,
    seconds: float,
) -> Load:
    """Let ``clients`` ask for ``requests`` in turn, each again as soon as it is answered.

    One that is refused waits as long as it is told to, and up to half as long again: clients that
    were refused at once would else come back at once.
    """
    bodies = [body_of(request) for request in requests]
    start, stopped = perf_counter(), Event()

    def client(number: int) -> list[tuple[int, Reply | None]]:
        connection, replies = server.connection(), []
        chance = Random(number)  # noqa: S311 - no secret
        for index in count(number):
            if perf_counter() - start > seconds or stopped.is_set():
                break
            which, reply = index % len(bodies), None
            try:
                reply = ask(connection, bodies[which])
            except (OSError, HTTPException):
                connection.close()
            replies.append((which, reply))
            pause_s = _LOST_PAUSE_S if reply is None else reply.retry_after_s
            if pause_s:
                connection.close()  # the server would, of one that is idle for long
                stopped.wait(pause_s * chance.uniform(1, 1.5))
        connection.close()
        return replies

    resident, on_gpus = [], []
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, number) for number in range(clients)]
        try:
            for part in (1, 2, 3, 4):
                sleep(max(0.0, start + part * seconds / 4 - perf_counter()))
                resident.append(server.resident_bytes)
                on_gpus.append(held_on_gpus_bytes())
            replies = [reply for future in futures for reply in future.result()]
        except BaseException:  # an interrupt: the pool waits for its clients
            stopped.set()
            raise
    drawn = [(which, reply) for which, reply in replies if reply and reply.status == 200]
    differences = [_difference(reply.body, expected[which]) for which, reply in drawn]
    refused = [reply.ms for _, reply in replies if reply and reply.status == 429]
    return Load(
        clients=clients,
        seconds=perf_counter() - start,
        drawn_ms=tuple(reply.ms for _, reply in drawn),
        refused_ms=tuple(refused),
        wrong=sum(difference > 1 for difference in differences),
        differing=sum(difference == 1 for difference in differences),
        failed=len(replies) - len(drawn) - len(refused),
        resident_bytes=tuple(resident),
        gpu_bytes=tuple(on_gpus),
    )


def _difference(body: bytes, expected: NDArray[np.uint8]) -> int:
    from PIL import Image

    data = base64.b64decode(json.loads(body)["data"][0]["b64_json"])
    pixels = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    return int(np.abs(pixels - expected).max())


def _spread(times_ms: Sequence[float]) -> dict[str, float] | None:
    if len(times_ms) < 2:
        return None
    p99 = quantiles(times_ms, n=100, method="inclusive")[98]  # never beyond the slowest
    values = {"p50": median(times_ms), "p99": p99, "max": max(times_ms)}
    return {name: round(value, 2) for name, value in values.items()}
