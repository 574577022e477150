"""How well a bundle of the shipped checkpoint obeys: held-out captions, judged by the checker.

The one instrument for everything that trades quality: precisions, few steps, other samplers.
Scenes, captions and seeds are fixed by their index, so two runs answer the same questions.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_bench.checker import Fault, faults
from sd_bench.scene import Scene, caption, has_unseen_pair, random_scene
from sd_runtime import Request
from sd_runtime.command import raise_received_signal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from PIL import Image

    from sd_runtime import Pipeline


@dataclass(frozen=True)
class Answer:
    """One held-out caption, its picture and what the checker found wrong with it."""

    prompt: str
    scene: Scene
    seed: int
    image: Image.Image
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Score:
    """What a bundle reached on ``len(answers)`` captions."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def share(self) -> float:
        """Share of captions obeyed in every stated detail, 0 … 1."""
        return sum(not answer.faults for answer in self.answers) / len(self.answers)

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `share` (Wilson 1927)."""
        n, p, z = len(self.answers), self.share, 1.959964
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, center - half), min(1.0, center + half)

    def share_with(self, *, shapes: int) -> float | None:
        """`share` of the captions that ask for so many shapes; None where there is none."""
        return self._share_where(lambda scene: len(scene.things) == shapes)

    def share_with_unseen_pair(self) -> float | None:
        """`share` of the captions with an unseen colour and shape; None where there is none."""
        return self._share_where(has_unseen_pair)

    def _share_where(self, holds: Callable[[Scene], bool]) -> float | None:
        answers = tuple(answer for answer in self.answers if holds(answer.scene))
        return replace(self, answers=answers).share if answers else None


def held_out_captions(count: int) -> list[tuple[str, Scene]]:
    """The first ``count`` held-out captions, the same in every run, no two alike.

    Every fourth asks for a colour and shape that training never showed together; the others only
    for what it showed, in scenes that it did not.
    """
    captions: dict[str, Scene] = {}
    rng = np.random.default_rng(20_260_101)
    while len(captions) < count:
        scene = random_scene(rng, held_out=True)
        if has_unseen_pair(scene) == (len(captions) % 4 == 3):
            captions.setdefault(caption(scene, rng), scene)
    return list(captions.items())


def measure_quality(
    pipeline: Pipeline,
    options: Mapping[str, Any],
    *,
    captions: int = 200,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> Score:
    """One picture per held-out caption, seed = its index, each judged by `checker.faults`.

    ``options`` are `Request`'s, all but the prompt and the seed.
    """
    started = time.perf_counter()
    answers = []
    for seed, (prompt, scene) in enumerate(held_out_captions(captions)):
        raise_received_signal()
        image = pipeline.generate(Request(prompt, seed=seed, **options)).images[0]
        answer = Answer(prompt, scene, seed, image, tuple(faults(image, scene)))
        on_answer(answer)
        answers.append(answer)
    return Score(tuple(answers), time.perf_counter() - started)


def fault_kinds(score: Score) -> Counter[str]:
    """How often each kind of fault occurs, by `Fault.kind`."""
    return Counter(fault.kind for answer in score.answers for fault in answer.faults)
