"""What training sees, and what it must never see."""

from __future__ import annotations

import numpy as np
import pytest

from sd_bench.scene import (
    ANY_SHAPE,
    COLORS,
    MORE_SHAPES,
    SHAPES,
    Scene,
    Thing,
    caption,
    draw,
    has_unseen_pair,
    is_held_out,
    lesson,
    random_outline,
    shape_outline,
)


def test_lessons_keep_what_is_held_out() -> None:
    rng = np.random.default_rng(0)
    lessons = [lesson(rng) for _ in range(500)]
    assert not any(has_unseen_pair(scene) for scene in lessons)
    asked = [s for s in lessons if all(t.shape in SHAPES for t in s.things)]
    assert not any(is_held_out(scene) for scene in asked)
    drawn = {thing.shape for scene in lessons for thing in scene.things}
    assert drawn == {*SHAPES, *MORE_SHAPES, ANY_SHAPE}
    assert len(asked) > 200


@pytest.mark.parametrize("shape", [*SHAPES, *MORE_SHAPES])
def test_an_outline_fills_its_box(shape: str) -> None:
    _assert_centered(shape_outline(shape))


def test_any_outline_fills_its_box() -> None:
    rng = np.random.default_rng(0)
    outlines = [random_outline(rng) for _ in range(100)]
    for outline in outlines:
        _assert_centered(outline)
    assert {len(outline) for outline in outlines} == set(range(3, 11))


def _assert_centered(outline: np.ndarray) -> None:
    low, high = outline.min(axis=0), outline.max(axis=0)
    np.testing.assert_allclose(low, -high, atol=1e-9)
    assert (high - low).max() == pytest.approx(1)


@pytest.mark.parametrize("shape", [MORE_SHAPES[0], ANY_SHAPE])
def test_a_lesson_is_drawn_as_its_caption_says(shape: str) -> None:
    scene = Scene((Thing("red", shape, "large", "in the center"),), "white")
    rng = np.random.default_rng(0)
    assert caption(scene, rng).startswith(f"a large red {shape} in the center")
    image, placements = draw(scene, rng, resolution=64)
    pixels = np.asarray(image).astype(int)
    red = np.abs(pixels - COLORS["red"]).sum(axis=-1) < 30
    assert 0.02 < red.mean() < placements[0].side ** 2
