"""Errors as each dialect's clients read them, with what to do next."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sd_engines.errors import ConfigError, SdError
from sd_runtime.refusal import ENGINE_FAILED, RefusedError, status_of

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

logger = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_SCHEMA_HINT = "See /openapi.json for what a request may hold."


def openai_body(error: SdError) -> dict[str, Any]:
    """``error`` in OpenAI's shape. Clients show ``message``, so the hint is in it as well."""
    status, code = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {
            "message": str(error),
            "type": kind,
            "param": None,
            "code": code,
            "hint": error.hint,
        }
    }


def a1111_body(error: SdError) -> dict[str, Any]:
    """``error`` in the shape of AUTOMATIC1111's web UI."""
    _, code = status_of(error)
    return {"error": code, "detail": str(error), "body": "", "errors": error.hint}


def error_response(path: str, error: SdError) -> JSONResponse:
    """The answer to a request for ``path`` that ended in ``error``."""
    body = a1111_body if path.startswith(("/sdapi/", "/controlnet/")) else openai_body
    headers = dict(error.headers) if isinstance(error, RefusedError) else None
    return JSONResponse(body(error), status_code=status_of(error)[0], headers=headers)


def log_failure(error: Exception) -> None:
    """Say why an engine failed, or where a bug is. What a client did wrong: its answer alone."""
    if not isinstance(error, SdError) or status_of(error)[1] == ENGINE_FAILED:
        logger.error("%s", error, exc_info=error)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error that a handler of ``app`` raises; bugs keep their traceback in the log."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        known = as_sd_error(error)
        log_failure(known)
        return error_response(request.url.path, known)

    for kind in (SdError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def as_sd_error(error: Exception) -> SdError:
    """``error`` as clients may read it: of a bug only that it is one."""
    if isinstance(error, SdError):
        return error
    if isinstance(error, RequestValidationError):
        return _validation_error(error)
    if isinstance(error, HTTPException):
        if isinstance(error.__cause__, SdError):  # of a body that could not be read
            return error.__cause__
        return RefusedError(
            str(error.detail),
            _SCHEMA_HINT,
            status=error.status_code,
            code="http_error",
            headers=error.headers or {},
        )
    return RefusedError(
        "the server failed for a reason that nobody foresaw",
        "Its log has the traceback under this answer's X-Request-Id; please report it.",
        status=500,
        code="internal_error",
    )


def _validation_error(error: RequestValidationError) -> SdError:
    problems = []
    for problem in error.errors():
        place, words = ".".join(map(str, problem["loc"][1:])), str(problem["msg"])
        if problem["type"] == "json_invalid":  # whose place is a number of characters
            place, words = "", f"the body is no JSON: {problem['ctx']['error']}, at {place}"
        if "Expected UploadFile" in words:
            words = "must be a file of the form, not text"
        problems.append(f"{place}: {words}" if place else words)
    return ConfigError("; ".join(problems), _SCHEMA_HINT)
