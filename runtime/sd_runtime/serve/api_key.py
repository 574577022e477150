"""Where the API key comes from: a file, or the environment; never the command line."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sd_engines.errors import ConfigError, plain

if TYPE_CHECKING:
    from pathlib import Path

VARIABLE = "SD_SERVE_API_KEY"


def load_api_key(path: Path | None) -> str | None:
    """The key in the file at ``path``, else in ``$SD_SERVE_API_KEY``, else None.

    `ConfigError` where it cannot be read or is empty: that must not open the door.
    """
    if path is None:
        key = os.environ.get(VARIABLE)
        place = f"${VARIABLE}"
    else:
        place = str(path)
        try:
            key = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the API key in {path}: {plain(error)}",
                "Name a text file that holds it.",
            ) from error
    if key is None:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"the API key in {place} is empty or no plain ASCII",
            "Make one: openssl rand -hex 32 > KEYFILE.",
        )
    return key
