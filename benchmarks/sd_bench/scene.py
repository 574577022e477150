"""The world of the shipped checkpoint: coloured shapes, their captions and their pictures.

A scene is what a caption states. What it leaves open (``None``) is drawn at random, so the
checkpoint learns captions of every completeness and `checker` judges only what was asked for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

COLORS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (222, 38, 38),
    "orange": (250, 145, 20),
    "yellow": (250, 228, 40),
    "green": (36, 160, 60),
    "cyan": (50, 205, 225),
    "blue": (40, 85, 235),
    "purple": (145, 50, 195),
    "pink": (250, 130, 190),
}
BACKGROUNDS: Final[dict[str, tuple[int, int, int]]] = {
    "white": (248, 248, 248),
    "gray": (138, 138, 138),
    "black": (14, 14, 14),
    "brown": (104, 66, 36),
    "navy": (18, 28, 92),
}
SHAPES: Final = ("circle", "square", "triangle", "star", "cross")
MORE_SHAPES: Final = ("diamond", "hexagon", "heart", "arrow", "moon")
"""Drawn in training alone: the more shapes come in every colour, the less a shape means one."""
ANY_SHAPE: Final = "shape"
"""The word for what has no name: in training, any outline at all."""
SIZES: Final[dict[str, float]] = {"small": 0.20, "medium": 0.29, "large": 0.41}
"""Longer side of a shape's bounding box, as a share of the picture."""
ROWS: Final[dict[str, float]] = {"top": 0.24, "middle": 0.5, "bottom": 0.76}
COLUMNS: Final[dict[str, float]] = {"left": 0.24, "middle": 0.5, "right": 0.76}
PLACES: Final[dict[str, tuple[str, str]]] = {
    "in the top left": ("top", "left"),
    "at the top": ("top", "middle"),
    "in the top right": ("top", "right"),
    "on the left": ("middle", "left"),
    "in the center": ("middle", "middle"),
    "on the right": ("middle", "right"),
    "in the bottom left": ("bottom", "left"),
    "at the bottom": ("bottom", "middle"),
    "in the bottom right": ("bottom", "right"),
}
UNSEEN_PAIRS: Final = frozenset({("orange", "star"), ("cyan", "triangle"), ("purple", "cross")})
"""Colour and shape pairs that training never shows: held-out captions ask for them."""

_POSITION_JITTER: Final = 0.025
_SIZE_JITTER: Final = 0.012
_GAP: Final = 0.02


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; ``place`` is a key of `PLACES`, or None where the caption is silent."""

    color: str
    shape: str
    size: str
    place: str | None


@dataclass(frozen=True)
class Scene:
    """One to three things of different colours, and a background or None."""

    things: tuple[Thing, ...]
    background: str | None


@dataclass(frozen=True)
class Placement:
    """Where a thing was drawn, in shares of the picture: its box's centre and longer side."""

    x: float
    y: float
    side: float


def random_scene(rng: np.random.Generator, *, held_out: bool) -> Scene:
    """A scene that training may (``held_out=False``) or must not (``True``) contain."""
    while True:
        scene = _any_scene(rng)
        if is_held_out(scene) == held_out:
            return scene


def lesson(rng: np.random.Generator) -> Scene:
    """A training scene in which a third of the things are what the checker never asks for."""
    scene = random_scene(rng, held_out=False)
    return replace(scene, things=tuple(_reshaped(thing, rng) for thing in scene.things))


def _reshaped(thing: Thing, rng: np.random.Generator) -> Thing:
    chance = rng.random()
    if chance < 0.7:
        return thing
    return replace(thing, shape=str(rng.choice(MORE_SHAPES)) if chance < 0.9 else ANY_SHAPE)


def is_held_out(scene: Scene) -> bool:
    """True for one scene in ten, by hash, and for every scene that has an unseen pair."""
    return has_unseen_pair(scene) or hashlib.sha256(repr(scene).encode()).digest()[0] % 10 == 0


def has_unseen_pair(scene: Scene) -> bool:
    """True where the scene asks for one of `UNSEEN_PAIRS`."""
    return any((thing.color, thing.shape) in UNSEEN_PAIRS for thing in scene.things)


def _any_scene(rng: np.random.Generator) -> Scene:
    while True:
        count = int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3]))
        colors = rng.permutation(list(COLORS))[:count]
        places = rng.permutation(list(PLACES))[:count]
        placeless = count == 1 and rng.random() < 0.1
        things = tuple(
            Thing(
                color=str(colors[i]),
                shape=str(rng.choice(SHAPES)),
                size=str(rng.choice(list(SIZES))),
                place=None if placeless else str(places[i]),
            )
            for i in range(count)
        )
        background = None if rng.random() < 0.08 else str(rng.choice(list(BACKGROUNDS)))
        if _things_fit(things):
            return Scene(things, background)


def _things_fit(things: tuple[Thing, ...]) -> bool:
    spots = [(*_place_center(t.place), SIZES[t.size]) for t in things if t.place is not None]
    slack = 2 * _POSITION_JITTER + _SIZE_JITTER + _GAP
    return all(
        max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= (a[2] + b[2]) / 2 + slack
        for i, a in enumerate(spots)
        for b in spots[:i]
    )


def _place_center(place: str) -> tuple[float, float]:
    row, column = PLACES[place]
    return COLUMNS[column], ROWS[row]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the several ways to say the scene in English."""
    parts = []
    for thing in scene.things:
        size = "" if thing.size == "medium" else f"{thing.size} "
        adjectives = f"{size}{thing.color}"
        article = "an" if adjectives.startswith("orange") else "a"
        place = "" if thing.place is None else f" {thing.place}"
        parts.append(f"{article} {adjectives} {thing.shape}{place}")
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    if scene.background is None:
        return text
    joint = rng.choice([" on a", ", on a", " over a", ","])
    return f"{text}{joint} {scene.background} background"


def draw(
    scene: Scene, rng: np.random.Generator, *, resolution: int
) -> tuple[Image.Image, tuple[Placement, ...]]:
    """The scene as an RGB picture of ``resolution`` × ``resolution``, and where its things are."""
    background = scene.background or str(rng.choice(list(BACKGROUNDS)))
    scale = 4  # drawn larger and averaged down: anti-aliased edges
    canvas = Image.new("RGB", (resolution * scale, resolution * scale), BACKGROUNDS[background])
    pen = ImageDraw.Draw(canvas)
    placements = []
    for thing in scene.things:
        place = thing.place or str(rng.choice(list(PLACES)))
        x, y = (c + rng.uniform(-_POSITION_JITTER, _POSITION_JITTER) for c in _place_center(place))
        side = SIZES[thing.size] + rng.uniform(-_SIZE_JITTER, _SIZE_JITTER)
        any_shape = thing.shape == ANY_SHAPE
        unit = random_outline(rng) if any_shape else shape_outline(thing.shape)
        outline = (unit * side + (x, y)) * resolution * scale
        pen.polygon([(float(px), float(py)) for px, py in outline], fill=COLORS[thing.color])
        placements.append(Placement(x, y, side))
    return canvas.reduce(scale), tuple(placements)


def shape_outline(shape: str) -> np.ndarray:
    """Outline of a shape, float64 [points, 2]: bounding box centred on 0, longer side 1."""
    if shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=np.float64)
    elif shape == "triangle":
        points = np.array([(0, -1), (1, 0.8), (-1, 0.8)], dtype=np.float64)
    elif shape == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        points = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    elif shape == "cross":
        w = 0.34
        corners = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w)]
        points = np.array(corners + [(-x, -y) for x, y in corners], dtype=np.float64)
    elif shape == "diamond":
        points = np.array([(0, -1), (0.7, 0), (0, 1), (-0.7, 0)], dtype=np.float64)
    elif shape == "hexagon":
        angles = np.arange(6) * np.pi / 3
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif shape == "heart":
        t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = np.stack([16 * np.sin(t) ** 3, -y], axis=1)
    elif shape == "arrow":
        right = [(0, -1), (0.9, 0), (0.35, 0), (0.35, 1)]
        points = np.array(right + [(-x, y) for x, y in right[:0:-1]], dtype=np.float64)
    elif shape == "moon":
        outer, inner = np.linspace(0.7, 2 * np.pi - 0.7, 48), np.linspace(2 * np.pi - 1, 1, 48)
        tip = np.cos(0.7), np.sin(0.7)
        radius = tip[1] / np.sin(1.0)
        shift = tip[0] - radius * np.cos(1.0)
        points = np.concatenate(
            [
                np.stack([np.cos(outer), np.sin(outer)], axis=1),
                np.stack([radius * np.cos(inner) + shift, radius * np.sin(inner)], axis=1),
            ]
        )
    else:
        raise ValueError(f"no shape named {shape!r}")
    return _centered(points)


def random_outline(rng: np.random.Generator) -> np.ndarray:
    """An outline that has no name: 3 to 10 corners around a centre, each at its own distance."""
    corners = int(rng.integers(3, 11))
    angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
    angles += rng.uniform(0, 2 * np.pi)
    radii = rng.uniform(0.4, 1.0, corners)
    return _centered(np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1))


def _centered(points: np.ndarray) -> np.ndarray:
    low, high = points.min(axis=0), points.max(axis=0)
    centered: np.ndarray = (points - (low + high) / 2) / (high - low).max()
    return centered
