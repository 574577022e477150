"""The process: a socket, the bundles, the application, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

import click
import uvicorn

from sd_engines.errors import ConfigError, plain
from sd_runtime.engine_room import EngineRoom
from sd_runtime.serve.app import make_app
from sd_runtime.serve.metrics import Metrics
from sd_runtime.serve.models import Models

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import FrameType

    from sd_engines.spec import Precision

logger = logging.getLogger(__name__)
SEND_TIMEOUT_S = 30
"""How long clients may take to fetch what is drawn once the server ends."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line, parsed. ``port`` 0 takes a free one."""

    host: str
    port: int
    queue_size: int
    max_images: int
    max_steps: int
    backend: str
    precision: Precision | None
    threads: int | None
    loras: tuple[str, ...]
    api_key: str | None


class DrainingServer(uvicorn.Server):
    """Ends in order: the first signal drains the room, a second cancels what is in it.

    While it drains it still answers: that it is not ready, and what it had accepted. SIGHUP, of
    which a terminal that is closed may send several, is a first signal and never a second; where it
    is ignored, as under nohup, it stays so.
    """

    def __init__(self, config: uvicorn.Config, room: EngineRoom, url: str) -> None:
        super().__init__(config)
        self.signals: list[int] = []
        self._room = room
        self._url = url

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have `handle_exit` called for SIGHUP too."""
        before = signal.getsignal(signal.SIGHUP)
        with super().capture_signals():
            if before is not signal.SIG_IGN:
                signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal; `on_tick` acts on it, for locks cannot be taken here."""
        if sig == signal.SIGHUP and self.signals:
            return
        self.signals.append(sig)
        if self.should_exit:  # all is drawn, and only clients that are slow are waited for
            asyncio.get_running_loop().call_soon_threadsafe(self._hang_up)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where on stdout."""
        await super().startup(sockets=sockets)
        click.echo(self._url)

    async def on_tick(self, counter: int) -> bool:
        """Called every 0.1 s; True ends the server."""
        if self.signals and self._room.accepting:
            logger.info("Finishing what was accepted; another signal cancels it.")
            self._room.drain()
        if len(self.signals) > 1:
            self._room.cancel_all()
        if self._room.finished:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for what clients still send or fetch: `SEND_TIMEOUT_S`, or until another signal."""
        timer = asyncio.get_running_loop().call_later(SEND_TIMEOUT_S, self._hang_up)
        await super().shutdown(sockets=sockets)
        timer.cancel()

    def _hang_up(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def serve(bundles: Sequence[Path], settings: Settings) -> int:
    """Serve ``bundles`` until a signal comes; the exit code: 0, or 130 and 143 after a second one.

    Raises `ConfigError` where the address cannot be listened on, and as `Models.load`.
    """
    metrics = Metrics()
    with _bound_socket(settings) as listener:
        _warn_of_strangers(listener, settings.api_key)
        with (
            Models.load(
                bundles,
                backend=settings.backend,
                precision=settings.precision,
                threads=settings.threads,
                loras=settings.loras,
                max_images=settings.max_images,
                max_steps=settings.max_steps,
            ) as models,
            EngineRoom(
                models.default.pipeline,
                queue_size=settings.queue_size,
                on_drawn=metrics.count_batch,
            ) as room,
        ):
            metrics.watch(room)
            config = uvicorn.Config(
                make_app(room, models, metrics=metrics, api_key=settings.api_key),
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
            )
            server = DrainingServer(config, room, _url(listener))
            _listen(listener, settings)
            server.run(sockets=[listener])
    return 0 if len(server.signals) < 2 else 128 + server.signals[1]


def _bound_socket(settings: Settings) -> socket.socket:
    """Bound now, before anything heavy; it listens once there is somebody to answer."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that can be none
        raise _address_error(settings, error) from error
    return listener


def _listen(listener: socket.socket, settings: Settings) -> None:
    """Listen at last: `ConfigError` where another server, bound meanwhile, was the first to."""
    try:
        listener.listen()
    except OSError as error:
        raise _address_error(settings, error) from error


def _address_error(settings: Settings, error: OSError | UnicodeError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {settings.host}, port {settings.port}: {plain(error)}",
        "Choose another --host or --port; 0 takes a free port.",
    )


def _warn_of_strangers(listener: socket.socket, api_key: str | None) -> None:
    address = ip_address(listener.getsockname()[0].partition("%")[0])
    if api_key is None and not address.is_loopback:
        logger.warning(
            "Anybody who reaches %s may draw: give an --api-key-file, or listen on 127.0.0.1",
            address,
        )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
