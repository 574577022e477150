"""Small files of what was measured on this machine, kept below ``$XDG_CACHE_HOME/sd-toolkit``.

Whatever is lost of them is measured again.
"""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)


def cached_file(name: str) -> Path | None:
    """Where ``name`` is kept; None where the user has no home."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # such a value is to be ignored: XDG Base Directory Specification
        try:
            root = Path.home() / ".cache"
        except RuntimeError:
            return None
    return root / "sd-toolkit" / name


def read_cached(path: Path | None) -> bytes:
    """What is kept at ``path``; empty where nothing is."""
    if path is None:
        return b""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def write_cached(path: Path | None, content: bytes) -> bool:
    """Keep ``content`` at ``path``, whole or not at all; whether it is, and why not in the log."""
    if path is None:
        return False
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.write_bytes(content)
        staging.replace(path)
    except OSError as error:
        logger.info("%s is not kept: %s", path, error)
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        return False
    return True
