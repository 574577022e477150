"""What `sd-bench peers` and a worker say to each other: one JSON object a line, asked and answered.

A worker is a script of this folder, run by the Python of its peer's environment, so this file
needs nothing but numpy and Pillow. Questions are ``{"do": "prepare" | "load" | "generate", …}``;
an answer is ``{"ok": true, …}`` or ``{"ok": false, "error": …}``. "generate" may name as "instead"
what differs from the job that was loaded: prompt, seed and noise. A worker ends with its input.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

PREPARED = "prepared.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every peer draws, and from what.

    ``model`` is a checkpoint folder as on the Hub, ``bundle`` ours; ``prepared`` a folder of the
    peer's own for what it converts or compiles once. ``scheduler_name`` is ours, ``scheduler`` the
    path of its config in diffusers' words, ``sigmas`` its grid as sigma / alpha, one more than
    there are UNet calls. ``noise`` is the path of float32 [draws, 1, channels, height / 8,
    width / 8], the first one for the latents. ``pictures`` is how many this process will be asked
    for, None where they are many.
    """

    model: str
    bundle: str
    prepared: str
    threads: int
    precision: str
    backend: str
    safety_checker: bool
    scheduler_name: str
    scheduler: str
    sigmas: list[float]
    noise: str
    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    pictures: int | None

    @classmethod
    def from_question(cls, question: Mapping[str, Any]) -> Self:
        """The job in a "load" question."""
        return cls(**{each.name: question[each.name] for each in fields(cls)})

    @property
    def unchecked(self) -> dict[str, str]:
        """What a peer without a safety checker remarks where the others have one."""
        return {"safety checker": "not run"} if self.safety_checker else {}


@dataclass(frozen=True)
class Drawing:
    """A picture uint8 [height, width, 3], and its final latents float32 where they were asked for.

    ``latents`` [1, channels, height / 8, width / 8], None where the peer does not show them;
    ``settings`` are remarks that only drawing brings to light.
    """

    pixels: NDArray[np.uint8]
    latents: NDArray[np.float32] | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


class Peer(Protocol):
    """One program that draws. Anything it raises is answered as its error."""

    @property
    def packages(self) -> Sequence[str]:
        """Distributions whose versions say what was measured."""

    def prepare(self, job: Job, folder: Path) -> None:
        """Convert, export or compile into ``folder``, once per checkpoint."""

    def load(self, job: Job) -> dict[str, str]:
        """Get ready to draw; the settings and remarks that belong to the figures."""

    def generate(self, job: Job, *, with_latents: bool) -> Drawing:
        """Draw; timed, unless the latents are asked for."""


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions by distribution."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def serve(peer: Peer) -> None:
    """Answer the questions on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between the answers
    jobs: list[Job] = []
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = {"ok": True, **_answer(peer, question, jobs)}
        except BaseException as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}".strip()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(peer: Peer, question: Mapping[str, Any], jobs: list[Job]) -> dict[str, Any]:
    if question["do"] == "prepare":
        return _prepare(peer, Job.from_question(question))
    if question["do"] == "load":
        jobs[:] = [Job.from_question(question)]
        start = time.perf_counter()
        settings = peer.load(jobs[0])
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "settings": settings, "versions": versions(peer.packages)}
    if question["do"] != "generate" or not jobs:
        raise ValueError(f"cannot {question['do']!r} now")
    job = replace(jobs[0], **question.get("instead", {}))
    start = time.perf_counter()
    drawing = peer.generate(job, with_latents=question["latents"] is not None)
    seconds = time.perf_counter() - start
    if question["picture"] is not None:
        _save_picture(drawing.pixels, question["picture"])
    if question["latents"] is not None and drawing.latents is not None:
        np.save(question["latents"], drawing.latents)
    return {
        "seconds": seconds,
        "settings": dict(drawing.settings),
        "peak_memory_bytes": _memory_bytes("VmHWM"),
        "own_memory_bytes": _memory_bytes("RssAnon"),
    }


def _prepare(peer: Peer, job: Job) -> dict[str, Any]:
    """Make the peer's folder, unless these versions made it before; how long making it took."""
    folder, found = Path(job.prepared), versions(peer.packages)
    note = folder / PREPARED
    if note.exists():
        known = json.loads(note.read_text("utf-8"))
        if known["versions"] == found:
            return {"seconds": known["seconds"], "reused": True}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    peer.prepare(job, folder)
    seconds = time.perf_counter() - start
    note.write_text(json.dumps({"versions": found, "seconds": seconds}), "utf-8")
    return {"seconds": seconds, "reused": False}


def _save_picture(pixels: NDArray[np.uint8], path: str) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path)


def _memory_bytes(kind: str) -> int | None:
    """What the kernel calls ``kind``; None where it does not say.

    VmHWM is the most that was resident so far: ``ru_maxrss`` starts at what the parent held when it
    forked. RssAnon is what is resident now and of no file: it cannot be had by reading it again.
    """
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return None
    lines = (line.partition(":") for line in status.splitlines())
    return next((1024 * int(rest.split()[0]) for name, _, rest in lines if name == kind), None)
