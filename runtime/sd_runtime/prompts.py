"""Requests from a file: text with one prompt a line, or JSON Lines with options beside each."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ConfigError
from sd_engines.node import unique_object
from sd_runtime.request import Request
from sd_runtime.request_pictures import PICTURES, read_pictures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
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
            values = json.loads(line, object_pairs_hook=unique_object)
            if not isinstance(values, dict):
                raise ConfigError("not an object", 'Write one a line: {"prompt": "a red circle"}.')
            requests.append(Request.from_mapping({**options, **values}))
        except (ValueError, RecursionError) as error:
            problem: object = error
            if isinstance(error, json.JSONDecodeError):  # which counts lines within this one
                problem = f"{error.msg}, at column {error.colno}"
            raise ConfigError(
                f"{path}, line {number}: {problem}", 'Write one a line: {"prompt": "a red circle"}.'
            ) from error
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error.message}", error.hint) from error
    return requests


def requests_from_file(path: Path, options: Mapping[str, Any]) -> list[Request]:
    """One request a line of a ``.jsonl`` or a text file, as the two functions above."""
    if path.suffix == ".jsonl":
        return requests_from_jsonl(path, options)
    return [Request(prompt, **options) for prompt in prompts_from_text(path)]


def request_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was ``given`` for all requests but the seed, its pictures read once for all."""
    options = {name: value for name, value in given.items() if name != "seed"}
    pictures = [name for name in PICTURES if name in options]
    return options | {name: read_pictures(name, options[name]) for name in pictures}


def seed_requests(requests: Sequence[Request], first_seed: int | None) -> list[Request]:
    """Seeds for those without: one after the other from ``first_seed``, or from a random one."""
    missing = sum(request.num_images for request in requests if request.seed is None)
    next_seed = secrets.randbelow(2**32 - missing) if first_seed is None else first_seed
    seeded = []
    for request in requests:
        if request.seed is None:
            seeded.append(replace(request, seed=next_seed))
            next_seed += request.num_images
        else:
            seeded.append(request)
    return seeded


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
    # Not splitlines, which also ends a line at characters that JSON's texts may hold.
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), start=1)]
    found = [(number, line) for number, line in lines if line]
    if not found:
        raise ConfigError(f"{path} holds no prompts", "Write one prompt a line.")
    return found
