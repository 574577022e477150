"""What a C program asks for in JSON: the fields of a request that ``sd_request`` has not."""

from __future__ import annotations

import json
from typing import Any

from sd_engines.errors import ConfigError
from sd_engines.node import check_depth, unique_object


def options_from_json(text: str) -> dict[str, Any]:
    """Fields of a `Request` from a JSON object; raises `ConfigError`."""
    try:
        check_depth(text)
        options = json.loads(text, object_pairs_hook=unique_object)
    except ValueError as error:
        raise ConfigError(f"options_json cannot be read: {error}", "Give a JSON object.") from error
    if not isinstance(options, dict):
        raise ConfigError("options_json is no object", 'Give one, such as {"eta": 0.5}.')
    return options
