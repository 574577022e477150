"""Log lines on stderr: words for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

from sd_runtime.ticket import request_id

LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, ``request_id`` and its fields.

    Prompts are never among them, but for what the tokenizer says of one that is too long.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get() or None,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """``INFO: message [request id]``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, or several with a traceback."""
        text, own_id = super().format(record), request_id.get()
        return f"{text} [{own_id}]" if own_id else text


def start_logging(form: LogFormat) -> None:
    """Send every log line of this process to stderr, and Python's warnings as such lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter() if form == "json" else TextFormatter("%(levelname)s: %(message)s")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
