"""The arithmetic of the quality score; the score itself is a measurement, not a test."""

import pytest
from PIL import Image
from scipy.stats import binomtest

from sd_bench.checker import Fault
from sd_bench.quality import Answer, Score, fault_kinds, held_out_captions
from sd_bench.scene import has_unseen_pair, is_held_out


def score(right: int, wrong: int) -> Score:
    (prompt, scene), image = held_out_captions(1)[0], Image.new("RGB", (8, 8))
    fault = Fault("size", "small, not large")
    return Score(
        tuple(
            Answer(prompt, scene, i, image, () if i < right else (fault,))
            for i in range(right + wrong)
        ),
        seconds=1.0,
    )


def test_captions_are_the_same_in_every_run_and_all_held_out() -> None:
    captions = held_out_captions(50)
    assert captions == held_out_captions(200)[:50]
    assert len({prompt for prompt, _ in captions}) == 50
    assert all(is_held_out(scene) for _, scene in captions)
    assert [has_unseen_pair(scene) for _, scene in captions] == [i % 4 == 3 for i in range(50)]


def test_interval_is_wilsons() -> None:
    peer = binomtest(190, 200).proportion_ci(method="wilson")
    assert score(190, 10).interval() == pytest.approx((peer.low, peer.high))
    assert score(5, 0).interval()[1] == 1.0


def test_shares_and_kinds_count_answers() -> None:
    mixed = score(3, 1)
    assert mixed.share == 0.75
    assert fault_kinds(mixed) == {"size": 1}
    things = len(mixed.answers[0].scene.things)
    assert mixed.share_with(shapes=things) == 0.75
    assert mixed.share_with(shapes=things % 3 + 1) is None
