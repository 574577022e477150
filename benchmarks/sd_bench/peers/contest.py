"""One run of `sd-bench peers`: who is here, what they draw, and in which order they take turns."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sd_bench.environment import environment
from sd_bench.measurable import measurable_bundle
from sd_bench.peers.captions import answer_captions, caption_questions
from sd_bench.peers.checkpoint import checkpoint_folder, checkpoint_key, stage_checkpoint
from sd_bench.peers.comparison import Comparison, Row, judge
from sd_bench.peers.contestant import enlist
from sd_bench.peers.peer import OURS, REFERENCE, REFERENCE_CUDA, how_to_install, missing
from sd_bench.peers.worker import WorkerError
from sd_engines.bundle import open_bundle
from sd_engines.cores import usable_cores
from sd_engines.errors import ConfigError
from sd_engines.kernel_file import kernel_text
from sd_runtime.noise import NoiseStream
from sd_runtime.plan import plan
from sd_runtime.scheduler_config import effective_config, pipeline_scheduler_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from sd_bench.measurement import Settings
    from sd_bench.peers.contestant import Contestant
    from sd_bench.peers.peer import Peer
    from sd_bench.peers.worker import Worker
    from sd_engines.bundle import Bundle

logger = logging.getLogger(__name__)

_FREE_HINT: Final = "Close other programs, or name fewer peers: --peer NAME."


@dataclass(frozen=True)
class Turns:
    """How often: cold starts per peer, rounds in which each peer draws once, warm, and captions.

    ``captions`` of `sd_bench.quality` are then drawn by each peer and judged, untimed.
    """

    cold_starts: int = 3
    rounds: int = 8
    captions: int = 0


def measure_peers(
    bundle_path: Path,
    settings: Settings,
    *,
    peers: Sequence[Peer],
    model: str | None,
    turns: Turns,
    cache: Path,
    folder: Path,
) -> Comparison:
    """Draw the same picture by ``bundle_path`` and by each of ``peers``, in turns.

    ``model`` None: the checkpoint that the bundle names. ``cache`` keeps what peers convert, and
    ``folder`` gets every picture, the latents and the workers' logs. A peer that fails or is not
    installed says so in its row. Raises `SdError` and its kin where the bundle, the checkpoint or
    the request is at fault, `WorkerError` where ours fails.
    """
    bundle = measurable_bundle(bundle_path)
    source = model or bundle.manifest.model.source
    folder.mkdir(parents=True, exist_ok=True)
    if not OURS.worker.exists():
        raise ConfigError(
            f"there are no workers at {OURS.worker.parent}",
            "They are no part of the wheel: run from a checkout, pip install --editable .",
        )
    threads = settings.threads or usable_cores()
    job = _job(bundle, settings, threads=threads, folder=folder)
    original = checkpoint_folder(source)
    key = checkpoint_key(original)
    job["model"] = str(_staged(original, cache / "checkpoints" / key))
    contestants = [
        enlist(peer, job, key=key, bundle=bundle, cache=cache, folder=folder)
        for peer in (OURS, *peers)
    ]
    for each in contestants:
        _prepare(each, cache)
    for start in range(turns.cold_starts):
        for each in _in_turn(contestants, start):
            with each.attempt():
                _start_cold(each, folder)
    with ExitStack() as stack:
        workers = _start_all(contestants, folder, stack)
        for turn in range(-1, turns.rounds):  # the first is for what only repeats settle
            for each in _in_turn(contestants, turn):
                with each.attempt():
                    _draw(each, workers[each.peer.name], count=turn >= 0)
        if turns.captions:
            questions = caption_questions(turns.captions, job, folder)
            for each in _in_turn(contestants, 0):
                with each.attempt():
                    answer_captions(each, workers[each.peer.name], questions)
    check_unchanged(original, key, bundle)
    rows = [each.row for each in contestants]
    names = [row.name for row in rows]
    reference = REFERENCE_CUDA if REFERENCE_CUDA in names else REFERENCE
    judge(rows, _pictures(rows, folder), reference=reference)
    return Comparison(
        bundle=str(bundle_path),
        fingerprint=bundle.manifest.fingerprint,
        model=str(source),
        settings=settings,
        threads=threads,
        environment=environment(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        reference=reference,
        rows=rows,
    )


def check_unchanged(checkpoint: Path, key: str, bundle: Bundle) -> None:
    """`ConfigError` where the checkpoint or the bundle is no longer what the first turn read."""
    now = open_bundle(bundle.path).manifest
    if checkpoint_key(checkpoint) != key or now.fingerprint != bundle.manifest.fingerprint:
        raise ConfigError(
            "the checkpoint or the bundle changed while it was measured", "Measure again."
        )


def _staged(original: Path, folder: Path) -> Path:
    """``folder``, with `stage_checkpoint`'s copy of ``original``, made once and whole."""
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        stage_checkpoint(original, partial)
        partial.rename(folder)
    return folder


def _job(bundle: Bundle, settings: Settings, *, threads: int, folder: Path) -> dict[str, Any]:
    """What `protocol.Job` holds, apart from what differs by peer; writes its files."""
    model, planned = bundle.manifest.model, plan(settings.request(), bundle.manifest)
    name, table, profile = planned.scheduler, planned.table, planned.profile
    config = effective_config(pipeline_scheduler_config(model.scheduler, family=model.family), name)
    scheduler = folder / "scheduler_config.json"
    known = {key: value for key, value in config.items() if value is not None}
    scheduler.write_text(json.dumps(known, indent=1), "utf-8")
    channels = model.latent_channels
    stream = NoiseStream(settings.seed)
    shape = (1, channels, profile.latent_height, profile.latent_width)
    noise = np.stack([stream.normal(shape) for _ in range(table.num_rows + 1)])
    np.save(folder / "noise.npy", noise.astype(np.float32))
    return {
        "bundle": str(bundle.path),
        "threads": threads,
        "backend": settings.backend,
        "safety_checker": "safety_checker" in bundle.manifest.components,
        "scheduler_name": name,
        "scheduler": str(scheduler),
        "sigmas": (table.sigma / table.alpha).tolist(),
        "noise": str(folder / "noise.npy"),
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt,
        "seed": settings.seed,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "height": profile.height,
        "width": profile.width,
    }


def _in_turn(contestants: Sequence[Contestant], turn: int) -> list[Contestant]:
    """Those taking part: A B C, then C B A, so that a drift hits all alike."""
    present = [contestant for contestant in contestants if contestant.taking_part]
    return present if turn % 2 == 0 else present[::-1]


def _prepare(contestant: Contestant, cache: Path) -> None:
    """Convert once, in a process that ends; rows of what is not installed say so."""
    lacking = missing(contestant.peer, cache)
    if lacking:
        hint = how_to_install(contestant.peer)
        contestant.row.fail(lacking, hint, state="not installed")
        return
    logger.info("%s: prepares", contestant.peer.name)
    with contestant.attempt(), contestant.worker() as worker:
        contestant.row.prepare_s = worker.ask(contestant.question("prepare"))["seconds"]


def _start_cold(contestant: Contestant, folder: Path) -> None:
    """From a new process to its first picture, which is then closed."""
    logger.info("%s: starts cold", contestant.peer.name)
    picture = folder / f"{contestant.peer.name}.png"
    with contestant.worker() as worker:
        worker.tell(contestant.question("load", pictures=1))
        worker.tell({"do": "generate", "picture": str(picture), "latents": None})
        loaded = worker.answer()
        drawn = worker.answer()
        contestant.row.cold_start_ms.append(1e3 * (perf_counter() - worker.started_s))
        contestant.row.load_ms.append(1e3 * loaded["seconds"])
        contestant.row.add_memory(drawn)


def _start_all(
    contestants: Sequence[Contestant], folder: Path, stack: ExitStack
) -> dict[str, Worker]:
    """Workers that stay, each with its picture and latents on disk, all of them paused."""
    workers: dict[str, Worker] = {}
    for contestant in _in_turn(contestants, 0):
        needed, free = contestant.row.peak_memory_bytes or 0, _available_memory_bytes()
        if free is not None and needed > free:
            message = f"needs {needed / 1e9:.1f} GB beside the others, {free / 1e9:.1f} GB are free"
            if contestant.peer is OURS:
                raise WorkerError(f"sd-toolkit {message}", _FREE_HINT)
            contestant.row.fail(message, _FREE_HINT, state="failed")
            continue
        name = contestant.peer.name
        (folder / f"{name}.npy").unlink(missing_ok=True)  # of an earlier run
        with contestant.attempt():
            worker = workers[name] = stack.enter_context(contestant.worker())
            loaded = worker.ask(contestant.question("load"))
            contestant.row.versions = loaded["versions"]
            contestant.row.settings = loaded["settings"]
            drawn = worker.ask(
                {
                    "do": "generate",
                    "picture": str(folder / f"{name}.png"),
                    "latents": str(folder / f"{name}.npy"),
                }
            )
            contestant.row.settings |= drawn["settings"]
            contestant.row.precision = drawn["settings"].get("precision", contestant.row.precision)
            worker.pause()
    return workers


def _draw(contestant: Contestant, worker: Worker, *, count: bool) -> None:
    worker.resume()
    drawn = worker.ask({"do": "generate", "picture": None, "latents": None})
    worker.pause()
    row = contestant.row
    row.add_memory(drawn)
    if count:
        row.warm_ms.append(1e3 * drawn["seconds"])


def _pictures(
    rows: Sequence[Row], folder: Path
) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.float32] | None]]:
    from PIL import Image

    found = {}
    for row in rows:
        picture, latents = folder / f"{row.name}.png", folder / f"{row.name}.npy"
        if row.state == "measured" and picture.exists():
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            found[row.name] = (pixels, np.load(latents) if latents.exists() else None)
    return found


def _available_memory_bytes() -> int | None:
    """What the system could give without swapping; None where it does not say."""
    found = dict(line.split(":", 1) for line in kernel_text("/proc/meminfo").splitlines())
    return 1024 * int(found["MemAvailable"].split()[0]) if found else None
