"""The checker reads every drawing right, and sees each kind of disobedience."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sd_bench.checker import faults
from sd_bench.scene import Scene, Thing, caption, draw, is_held_out, random_scene

RED_CIRCLE = Thing(color="red", shape="circle", size="large", place="in the top left")
SCENE = Scene((RED_CIRCLE,), "white")


def picture(scene: Scene, *, resolution: int = 128) -> Image.Image:
    return draw(scene, np.random.default_rng(0), resolution=resolution)[0]


@pytest.mark.parametrize("resolution", [128, 256])
def test_every_drawing_obeys_its_own_caption(resolution: int) -> None:
    rng = np.random.default_rng(5)
    for i in range(40):
        scene = random_scene(rng, held_out=i % 2 == 0)
        assert faults(draw(scene, rng, resolution=resolution)[0], scene) == []


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("background", replace(SCENE, background="gray")),
        ("missing", Scene((replace(RED_CIRCLE, color="blue"),), "white")),
        ("extra", Scene((replace(RED_CIRCLE, color="blue"),), "white")),
        ("shape", Scene((replace(RED_CIRCLE, shape="square"),), "white")),
        ("size", Scene((replace(RED_CIRCLE, size="small"),), "white")),
        ("place", Scene((replace(RED_CIRCLE, place="on the right"),), "white")),
    ],
)
def test_each_kind_of_disobedience_is_seen(kind: str, asked: Scene) -> None:
    assert kind in {fault.kind for fault in faults(picture(SCENE), asked)}


def test_what_the_caption_leaves_open_is_not_judged() -> None:
    silent = Scene((replace(RED_CIRCLE, place=None),), None)
    assert faults(picture(SCENE), silent) == []


def test_a_second_shape_of_a_colour_is_one_too_many() -> None:
    twice = Scene((RED_CIRCLE, replace(RED_CIRCLE, size="small", place="on the right")), "white")
    assert {fault.kind for fault in faults(picture(twice), SCENE)} == {"extra"}


def test_noise_is_no_shape() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert faults(Image.fromarray(noise), SCENE)


def test_training_never_sees_a_held_out_caption() -> None:
    rng = np.random.default_rng(11)
    seen = {caption(random_scene(rng, held_out=False), rng) for _ in range(500)}
    held = [random_scene(rng, held_out=True) for _ in range(500)]
    assert all(is_held_out(scene) for scene in held)
    assert not seen & {caption(scene, rng) for scene in held}
    assert not any("orange star" in words or "purple cross" in words for words in seen)
