"""Held-out captions, drawn by every peer and judged: what a speed costs in quality shows here."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_bench.checker import faults
from sd_bench.quality import held_out_captions
from sd_runtime.noise import NoiseStream

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sd_bench.peers.contestant import Contestant
    from sd_bench.peers.worker import Worker
    from sd_bench.scene import Scene

logger = logging.getLogger(__name__)


def caption_questions(
    captions: int, job: Mapping[str, Any], folder: Path
) -> list[tuple[Scene, dict[str, Any]]]:
    """Held-out scenes, and what differs from the job where each is asked for; writes the noise."""
    shape = np.load(job["noise"]).shape
    questions = []
    for seed, (prompt, scene) in enumerate(held_out_captions(captions)):
        stream, path = NoiseStream(seed), folder / f"noise-{seed:04}.npy"
        np.save(path, np.stack([stream.normal(shape[1:]) for _ in range(shape[0])]))
        questions.append((scene, {"prompt": prompt, "seed": seed, "noise": str(path)}))
    return questions


def answer_captions(
    contestant: Contestant, worker: Worker, questions: Sequence[tuple[Scene, dict[str, Any]]]
) -> None:
    """Let ``contestant`` draw ``questions``, and note in its row how many it obeyed."""
    from PIL import Image

    logger.info("%s: draws %d captions", contestant.peer.name, len(questions))
    worker.resume()
    obeyed = 0
    for scene, instead in questions:
        picture = Path(instead["noise"]).with_name(
            f"{contestant.peer.name}-{instead['seed']:04}.png"
        )
        worker.ask({"do": "generate", "picture": str(picture), "latents": None, "instead": instead})
        with Image.open(picture) as image:
            obeyed += not faults(image, scene)
    worker.pause()
    contestant.row.captions, contestant.row.captions_obeyed = len(questions), obeyed
