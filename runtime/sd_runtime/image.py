"""Pictures as files that carry their recipe: PNG, JPEG and WebP.

PNG holds the text in a ``parameters`` chunk and the JSON in an ``sd-toolkit`` chunk; JPEG and
WebP hold the text in EXIF's UserComment and the JSON in XMP. PNG and WebP keep every pixel.
"""

from __future__ import annotations

import base64
import html
import io
import re
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image

Kind = TypeVar("Kind", np.uint8, np.uint16)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_PIXELS = 64 * 10**6
_MOST_A_SIDE = {"JPEG": 65_500, "WEBP": 16_383}
_MOST_TEXT_BYTES = 65_000
"""A segment of a JPEG, less what stands before the text."""
JSON_CHUNK = "sd-toolkit"
_EXIF_IFD, _USER_COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/'
    '22-rdf-syntax-ns#"><rdf:Description rdf:about="" xmlns:sd="urn:sd-toolkit" '
    'sd:recipe="{}"/></rdf:RDF></x:xmpmeta>'
)
_XMP_RECIPE = re.compile(r'sd:recipe="([^"]*)"')


def format_of(path: Path) -> str:
    """Pillow's name of the format that ``path`` ends in; `ConfigError` for any other."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise ConfigError(
            f"{path.name!r} ends in no known picture format",
            f"Use one of {', '.join(FORMATS)}.",
        ) from None


def format_named(name: str) -> str:
    """Pillow's name of "png", "jpg", "jpeg" or "webp", in any case; `ConfigError` for any other."""
    try:
        return FORMATS[f".{name.lower()}"]
    except KeyError:
        names = ", ".join(suffix[1:] for suffix in FORMATS)
        raise ConfigError(f"{name!r} is no known picture format", f"Use one of {names}.") from None


def check_room(
    name: str, format_: str, size: tuple[int, int], *, parameters: str = "", recipe: str = ""
) -> None:
    """`ConfigError` where the file ``name`` has no room for a picture of ``size``, or its texts.

    ``format_`` is Pillow's name, ``size`` height and width. As `encode_image` finds too, once it is
    drawn.
    """
    most, (height, width) = _MOST_A_SIDE.get(format_), size
    if most is not None and max(height, width) > most:
        raise ConfigError(
            f"{name}: {width}×{height} pixels, and it can hold {most} a side",
            "Write a .png instead.",
        )
    if format_ == "JPEG":
        longest = max(len(_user_comment(parameters)), len(_xmp(recipe)))
        if longest > _MOST_TEXT_BYTES:
            raise ConfigError(
                f"{name}: its recipe is {longest} bytes long, and a JPEG file can hold "
                f"{_MOST_TEXT_BYTES}",
                "Write a .png instead.",
            )


def _user_comment(parameters: str) -> bytes:
    return _UNICODE + parameters.encode("utf-16-be")


def _xmp(recipe: str) -> bytes:
    return _XMP.format(html.escape(recipe)).encode()


def encode_image(
    pixels: NDArray[np.uint8 | np.uint16],
    format_: str,
    *,
    parameters: str = "",
    recipe: str = "",
) -> bytes:
    """The bytes of a picture file of ``pixels`` uint8 [H, W, 3], or in PNG uint16 [H, W] (grey).

    ``parameters`` is text for people, ``recipe`` is ASCII JSON. Raises `ConfigError` where the
    format has no room for the pixels, or a JPEG none for the texts (64 KiB each).
    """
    from PIL import Image

    name = f"a {format_} file"
    check_room(name, format_, pixels.shape[:2], parameters=parameters, recipe=recipe)
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if format_ == "PNG":
        from PIL.PngImagePlugin import PngInfo

        chunks = PngInfo()
        chunks.add_text("parameters", parameters)
        chunks.add_itxt(JSON_CHUNK, recipe)
        image.save(buffer, "PNG", pnginfo=chunks, compress_level=4)
        return buffer.getvalue()
    exif = Image.Exif()
    exif[_EXIF_IFD] = {_USER_COMMENT: _user_comment(parameters)}
    options: dict[str, Any] = (
        {"quality": 95, "subsampling": 0} if format_ == "JPEG" else {"lossless": True, "quality": 0}
    )
    try:
        image.save(buffer, format_, exif=exif.tobytes(), xmp=_xmp(recipe), **options)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"the picture cannot be written as a {format_} file: {error}", "Write a .png instead."
        ) from error
    return buffer.getvalue()


def read_recipe_text(path: Path) -> str:
    """The JSON that `encode_image` put into a picture; `ConfigError` where there is none."""
    from PIL import Image

    from sd_runtime.input_image import readable

    with readable(str(path)), Image.open(path) as image:
        image.load()
        text, xmp = image.info.get(JSON_CHUNK), image.info.get("xmp")
    if text is None and isinstance(xmp, bytes):
        found = _XMP_RECIPE.search(xmp.decode("utf-8", errors="replace"))
        text = html.unescape(found.group(1)) if found else None
    if text is None:
        raise ConfigError(
            f"{path} carries no recipe",
            "Only pictures that sd-run wrote, unedited, do; give the prompt yourself.",
        )
    return str(text)


def bytes_from_base64(text: str) -> bytes:
    """The bytes behind base64, bare or as a ``data:`` URL. No other URL is ever followed.

    It may be in lines, as ``base64`` and MIME write it.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise ConfigError(
            f"the picture is no base64: {error}", "Send its bytes in base64; URLs are not read."
        ) from error


def picture_from_base64(text: str) -> Image:
    """The same as a picture, as `picture_from_bytes`."""
    return picture_from_bytes(bytes_from_base64(text))


def picture_from_bytes(data: bytes) -> Image:
    """A picture that anybody may have sent, decoded.

    Raises `ConfigError` for all but PNG, JPEG and WebP of at most `MAX_PIXELS`.
    """
    from PIL import Image, UnidentifiedImageError

    hint = f"Send a PNG, JPEG or WebP of at most {MAX_PIXELS // 10**6} megapixels."
    try:
        image = Image.open(io.BytesIO(data), formats=[*set(FORMATS.values())])
        if image.width * image.height > MAX_PIXELS:
            raise ConfigError(f"the picture is of {image.width}×{image.height} pixels", hint)
        image.load()
    except ConfigError:
        raise
    except UnidentifiedImageError as error:
        raise ConfigError("the picture cannot be read: it is no PNG, JPEG or WebP", hint) from error
    except Exception as error:  # a file that was tampered with raises anything
        raise ConfigError(f"the picture cannot be read: {error}", hint) from error
    return image


def read_parameters(data: bytes) -> str:
    """The text for people in the bytes of a picture, this toolkit's or another's; "" without one.

    Raises `ConfigError` as `picture_from_bytes`.
    """
    image = picture_from_bytes(data)
    text = image.info.get("parameters")
    try:
        comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except Exception as error:  # as above
        raise ConfigError(
            f"the picture's EXIF cannot be read: {error}", "Send it as it was written."
        ) from error
    if text is None and isinstance(comment, bytes) and comment.startswith(_UNICODE):
        text = comment.removeprefix(_UNICODE).decode("utf-16-be", errors="replace")
    return text if isinstance(text, str) else ""


def grid_of(images: Sequence[NDArray[Kind]], *, columns: int) -> NDArray[Kind]:
    """One picture of many of one size, row by row; the last row is filled up with white."""
    (height, width, *channels), kind = images[0].shape, images[0].dtype
    rows = -(-len(images) // columns)
    grid = np.full((rows, height, columns, width, *channels), np.iinfo(kind).max, dtype=kind)
    for index, image in enumerate(images):
        grid[index // columns, :, index % columns] = image
    return grid.reshape(rows * height, columns * width, *channels)
