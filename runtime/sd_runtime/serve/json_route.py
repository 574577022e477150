"""Routes that read bodies of one kind, and take a JSON body as a form is taken: no field twice."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.params import Form
from fastapi.routing import APIRoute

from sd_engines.errors import ConfigError
from sd_engines.node import unique_object

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.responses import Response


class JsonRoute(APIRoute):
    """`ConfigError` for a body of another kind, and for a field that is there twice.

    All but the last of such fields would be dropped.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI lets a route read its requests in its own way."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            self._check_kind(request.headers.get("content-type", ""))
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle

    def _check_kind(self, sent: str) -> None:
        if self.body_field is None:
            return
        is_form = isinstance(self.body_field.field_info, Form)
        wanted = "multipart/form-data" if is_form else "application/json"
        if wanted not in sent.lower():
            raise ConfigError(
                f"the body is sent as {sent or 'something without a Content-Type'}",
                f"Send a form: {wanted}." if is_form else f"Send JSON, as Content-Type: {wanted}.",
            )


class _JsonRequest(Request):
    """Keeps nothing that was sent once it is read, for a request may wait in the queue."""

    async def body(self) -> bytes:
        # FastAPI keeps it until the answer, and asks of JSON only whether there is any.
        return (await super().body())[:1]

    async def json(self) -> Any:
        try:
            body, self._body = await super().body(), b""
            return json.loads(body, object_pairs_hook=unique_object)
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            raise ConfigError(
                f"the body cannot be read: {error}", "Send JSON in UTF-8, each field once."
            ) from error
