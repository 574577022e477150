"""Prompts from a file: text with one prompt a line, or JSON Lines with options beside each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ConfigError
from sd_runtime.request import Request

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def prompts_from_text(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank; `ConfigError` where there are none."""
    return [line for _, line in _lines(path)]


def requests_from_jsonl(path: Path, options: Mapping[str, Any]) -> list[Request]:
    """One request a line, ``{"prompt": …}`` with any other option of `Request`.

    ``options`` hold where a line says nothing; pictures are named by paths from the folder that
    the command runs in. `ConfigError` names the line at fault.
    """
    requests = []
    for number, line in _lines(path):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ConfigError("not an object", 'Write one a line: {"prompt": "a red circle"}.')
            requests.append(Request.from_mapping({**options, **values}))
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path}, line {number}: {error}", 'Write one a line: {"prompt": "a red circle"}.'
            ) from error
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error.message}", error.hint) from error
    return requests


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", "Name a file with one prompt a line."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}",
            "Save it as UTF-8, one prompt a line.",
        ) from error
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), start=1)]
    found = [(number, line) for number, line in lines if line]
    if not found:
        raise ConfigError(f"{path} holds no prompts", "Write one prompt a line.")
    return found
