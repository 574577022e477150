"""What every HTTP request goes through: an id, the key, the size of its body, log and metrics."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import re
import secrets
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from sd_runtime.refusal import RefusedError, client_left_error
from sd_runtime.serve.error_body import error_response
from sd_runtime.serve.offer import MAX_BODY_BYTES
from sd_runtime.serve.operations import OPEN_PATHS
from sd_runtime.ticket import request_id
from sd_runtime.timing import clock

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sd_runtime.serve.metrics import Metrics

logger = logging.getLogger(__name__)
BODY_TIMEOUT_S = 30.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Access:
    """ASGI middleware around the whole application. ``api_key`` None lets everybody in."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, api_key: str | None) -> None:
        self._app = app
        self._metrics = metrics
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it before the application sees it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = clock(), 500
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        own_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(8)
        request_id.set(own_id)

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = own_id
            await send(message)

        try:
            try:
                _check_site(scope["method"], headers)
                self._check_key(scope["path"], headers)
                replayed = _replay(await _read_body(headers, receive), receive)
            except RefusedError as error:
                await error_response(scope["path"], error)(scope, receive, send_noting)
            else:
                await self._app(scope, replayed, send_noting)
        finally:
            self._note(scope, status, clock() - start)

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._api_key is None or path in OPEN_PATHS:
            return
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = value.strip().encode("latin-1")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given).partition(b":")[2]
            except binascii.Error:
                raise _no_key() from None
        if not hmac.compare_digest(given, self._api_key):
            raise _no_key()

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.count_request(route, status, seconds)
        method, path = scope["method"], scope["raw_path"].decode("ascii", "replace")
        level = logging.DEBUG if route.startswith(("/health", "/metrics")) else logging.INFO
        duration_ms = round(1e3 * seconds, 3)
        fields = {"method": method, "path": path, "status": status, "duration_ms": duration_ms}
        logger.log(
            level, "%s %s %d %.1f ms", method, path, status, duration_ms, extra={"fields": fields}
        )


def _check_site(method: str, headers: Headers) -> None:
    """Refuse what a page of another site has its reader's browser send, with the reader's key.

    Browsers say so (Fetch Metadata); forms and empty bodies they would send without asking first.
    """
    if method == "POST" and headers.get("sec-fetch-site") == "cross-site":
        raise RefusedError(
            "a page of another site sent this",
            "Send it from the server's own page, or from a program.",
            status=403,
            code="cross_site",
        )


async def _read_body(headers: Headers, receive: Receive) -> bytes:
    """The whole body; `RefusedError` for one that is too large (413) or too slow (408)."""
    announced = headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while (message := await receive())["type"] == "http.request":
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
                if not message.get("more_body", False):
                    break
            else:
                raise client_left_error()
    except TimeoutError:
        raise RefusedError(
            f"the body took longer than {BODY_TIMEOUT_S:g} s",
            "Send it faster.",
            status=408,
            code="too_slow",
        ) from None
    return bytes(body)


def _no_key() -> RefusedError:
    return RefusedError(
        "the API key is missing or wrong",
        "Send Authorization: Bearer KEY, or KEY as the password of Basic authorization.",
        status=401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": 'Basic realm="sd-serve", charset="UTF-8"'},
    )


def _too_large() -> RefusedError:
    return RefusedError(
        "the body is too large",
        f"Send at most {MAX_BODY_BYTES} bytes.",
        status=413,
        code="too_large",
        headers={"Connection": "close"},
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    """A channel that gives ``body`` away, once, then whatever comes: the client leaving."""
    held = [body]

    async def receive_again() -> Message:
        if not held:
            return await receive()
        return {"type": "http.request", "body": held.pop(), "more_body": False}

    return receive_again
