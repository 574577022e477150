"""What a C program asks for in JSON: the fields of a request that ``sd_request`` has not."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from sd_engines.errors import ConfigError
from sd_engines.node import unique_object

_DEEPEST: Final = 16
"""More than any field has. The parser recurses in C, and a caller's thread may have little stack:
Python's own limit is for threads of megabytes."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def options_from_json(text: str) -> dict[str, Any]:
    """Fields of a `Request` from a JSON object; raises `ConfigError`."""
    try:
        _check_depth(text)
        options = json.loads(text, object_pairs_hook=unique_object)
    except ValueError as error:
        raise ConfigError(f"options_json cannot be read: {error}", "Give a JSON object.") from error
    if not isinstance(options, dict):
        raise ConfigError("options_json is no object", 'Give one, such as {"eta": 0.5}.')
    return options


def _check_depth(text: str) -> None:
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
