"""What a server refuses, and with which HTTP status."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from sd_engines.errors import ConfigError, SdError

if TYPE_CHECKING:
    from collections.abc import Mapping

ENGINE_FAILED = "engine_failed"
"""The code of what is neither refused nor the request's fault."""
_NONE: Mapping[str, str] = MappingProxyType({})


class RefusedError(SdError):
    """A request that is not answered: its HTTP ``status``, a short ``code``, more ``headers``."""

    def __init__(
        self, message: str, hint: str, *, status: int, code: str, headers: Mapping[str, str] = _NONE
    ) -> None:
        super().__init__(message, hint)
        self.status = status
        self.code = code
        self.headers = headers


def full_error(*, waiting: int, retry_after_s: int) -> RefusedError:
    """The queue holds as many as it may."""
    return RefusedError(
        f"the queue is full: {waiting} requests wait",
        f"Ask again in {retry_after_s} s, or start sd-serve with a larger --queue-size.",
        status=429,
        code="queue_full",
        headers={"Retry-After": str(retry_after_s)},
    )


def draining_error() -> RefusedError:
    """The server finishes what it has accepted, and then ends."""
    return RefusedError(
        "the server is shutting down",
        "Ask another one, or ask again once it has been started anew.",
        status=503,
        code="shutting_down",
        headers={"Retry-After": "5"},
    )


def cancelled_error() -> RefusedError:
    """Somebody stopped the drawing: its client, an interrupt, or the end of the server."""
    return RefusedError(
        "the drawing was cancelled",
        "Ask again: an interrupt stops whatever is being drawn.",
        status=409,
        code="cancelled",
        headers={"X-Should-Retry": "false"},  # openai's client would, at once
    )


def client_left_error() -> RefusedError:
    """Nobody waits for the answer any more, and nobody reads this one."""
    return RefusedError("the client left", "Stay.", status=499, code="client_left")


def status_of(error: SdError) -> tuple[int, str]:
    """The HTTP status and the short code of ``error``."""
    if isinstance(error, RefusedError):
        return error.status, error.code
    if isinstance(error, ConfigError):
        return 400, "invalid_value"
    return 500, ENGINE_FAILED
