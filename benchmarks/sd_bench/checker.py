"""Reads a picture of coloured shapes and says where it disobeys its caption.

Nearest palette colour per pixel, then the shape whose ideal silhouette overlaps the segment
best, then size and place from the segment's bounding box. It knows nothing of how the picture
was made, so it judges drawings, VAE round trips and generated pictures alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from sd_bench.scene import (
    BACKGROUNDS,
    COLORS,
    COLUMNS,
    PLACES,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    shape_outline,
)

_MIN_AREA: Final = 0.004
"""Share of the picture under which a colour counts as absent: the smallest drawn shape, a small
star or cross, covers about 0.011."""
_MIN_OVERLAP: Final = 0.72
"""Intersection over union with the ideal silhouette under which a segment is no shape at all."""
_TEMPLATE: Final = 64


@dataclass(frozen=True)
class Fault:
    """One way in which a picture disobeys its caption."""

    kind: Literal["background", "missing", "extra", "shape", "size", "place"]
    text: str

    def __str__(self) -> str:
        return self.text


def faults(image: Image.Image, scene: Scene) -> list[Fault]:
    """Every way in which the picture differs from the scene; empty where it obeys."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    names = [*COLORS, *BACKGROUNDS]
    palette = np.array([*COLORS.values(), *BACKGROUNDS.values()], dtype=np.float32)
    distance = ((pixels[:, :, None, :] - palette) ** 2).sum(axis=-1)  # [h, w, colours]
    nearest = distance.argmin(axis=-1)
    share = np.bincount(nearest.ravel(), minlength=len(names)) / nearest.size

    found: list[Fault] = []
    background = max(BACKGROUNDS, key=lambda name: share[names.index(name)])
    if scene.background not in (None, background):
        found.append(Fault("background", f"{background}, not {scene.background}, background"))
    wanted = {thing.color for thing in scene.things}
    for thing in scene.things:
        found += _thing_faults(nearest == names.index(thing.color), thing)
    for index, color in enumerate(COLORS):
        mask = nearest == index
        surplus = mask & ~_largest_blob(mask) if color in wanted else mask
        segment = _largest_blob(surplus)
        if segment.mean() >= _MIN_AREA and _thickness(segment) >= 0.04:
            found.append(Fault("extra", f"something {color} that nobody asked for"))
    return found


def _thing_faults(mask: np.ndarray, thing: Thing) -> list[Fault]:
    segment = _largest_blob(mask)
    if segment.mean() < _MIN_AREA:
        return [Fault("missing", f"no {thing.color} {thing.shape}")]
    found: list[Fault] = []
    rows, columns = np.flatnonzero(segment.any(axis=1)), np.flatnonzero(segment.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    overlaps = _overlaps(segment[top:bottom, left:right])
    shape = max(overlaps, key=lambda name: overlaps[name])
    if overlaps[shape] < _MIN_OVERLAP:
        text = f"{thing.color} blot, overlap {overlaps[shape]:.2f} with a {shape}"
        found.append(Fault("shape", text))
    elif shape != thing.shape:
        found.append(Fault("shape", f"{thing.color} {shape}, not {thing.shape}"))
    height, width = segment.shape
    side = max((bottom - top) / height, (right - left) / width)
    size = min(SIZES, key=lambda name: abs(np.log(SIZES[name] / side)))
    if size != thing.size:
        found.append(Fault("size", f"{thing.color} {thing.shape} {size}, not {thing.size}"))
    if thing.place is not None:
        y, x = (top + bottom) / 2 / height, (left + right) / 2 / width
        at = (_nearest_key(ROWS, y), _nearest_key(COLUMNS, x))
        if at != PLACES[thing.place]:
            text = f"{thing.color} {thing.shape} at {' '.join(at)}, not {thing.place}"
            found.append(Fault("place", text))
    return found


def _nearest_key(stops: dict[str, float], value: float) -> str:
    return min(stops, key=lambda name: abs(stops[name] - value))


def _overlaps(segment: np.ndarray) -> dict[str, float]:
    """Intersection over union of a segment, cut to its bounding box, with every silhouette."""
    height, width = segment.shape
    longer = max(height, width)
    square = np.zeros((longer, longer), dtype=bool)
    y, x = (longer - height) // 2, (longer - width) // 2
    square[y : y + height, x : x + width] = segment
    image = Image.fromarray(square.astype(np.uint8) * 255)
    probe = np.asarray(image.resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BILINEAR)) >= 128
    return {
        shape: float((probe & _silhouette(shape)).sum() / (probe | _silhouette(shape)).sum())
        for shape in SHAPES
    }


@lru_cache
def _silhouette(shape: str) -> np.ndarray:
    scale = 4
    image = Image.new("L", (_TEMPLATE * scale, _TEMPLATE * scale))
    outline = (shape_outline(shape) + 0.5) * _TEMPLATE * scale
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in outline], fill=255)
    return np.asarray(image.reduce(scale)) >= 128


def _largest_blob(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected region of a mask [h, w]; empty where the mask is."""
    labels, _ = ndimage.label(mask)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    largest: np.ndarray = (labels == areas.argmax()) & mask
    return largest


def _thickness(segment: np.ndarray) -> float:
    """Area over the longer side, as a share of the picture: seams between colours are thin."""
    if not segment.any():
        return 0.0
    rows, columns = segment.any(axis=1).sum(), segment.any(axis=0).sum()
    return float(segment.sum() / max(rows, columns) / max(segment.shape))
