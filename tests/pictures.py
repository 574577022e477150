"""Pictures as requests over HTTP carry them."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def png(picture: Image.Image) -> bytes:
    """The file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def text(picture: Image.Image) -> str:
    """The file in base64."""
    return base64.b64encode(png(picture)).decode()
