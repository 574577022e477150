"""One peer in one contest: what its worker is started with and asked, and the row it fills."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd_bench.peers.comparison import Row
from sd_bench.peers.peer import OURS, interpreter
from sd_bench.peers.worker import Worker, WorkerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from sd_bench.peers.peer import Peer
    from sd_engines.bundle import Bundle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contestant:
    """A peer, its row, and what its worker is started with and asked."""

    peer: Peer
    row: Row
    command: tuple[str | Path, ...]
    log: Path
    job: Mapping[str, Any]
    environment: Mapping[str, str]

    @property
    def taking_part(self) -> bool:
        """Whether nothing went wrong so far."""
        return self.row.state == "measured"

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Note a worker's error in the row; one of ours ends the run, for all is measured by it."""
        try:
            yield
        except WorkerError as error:
            if self.peer is OURS:
                raise
            logger.warning("%s failed: %s", self.peer.name, error.message)
            self.row.fail(error.message, error.hint, state="failed")

    def worker(self) -> Worker:
        """Start a process."""
        return Worker(self.command, log=self.log, environment=self.environment)

    def question(self, do: str, *, pictures: int | None = None) -> dict[str, Any]:
        """A question that carries the whole job, of so many ``pictures`` where that is known."""
        return {"do": do, "pictures": pictures, **self.job}


def enlist(
    peer: Peer, job: Mapping[str, Any], *, key: str, bundle: Bundle, cache: Path, folder: Path
) -> Contestant:
    """``peer`` with the job that all share and what differs by peer."""
    if peer is OURS:
        key = bundle.manifest.fingerprint[:16]
    elif peer.prepared_by_size:
        key = f"{key}-{job['height']}x{job['width']}"
    own = {
        "precision": peer.precision,
        "prepared": str(cache / "prepared" / f"{peer.prepared}-{key}"),
    }
    return Contestant(
        peer=peer,
        row=Row(name=peer.name, precision=peer.precision),
        command=(interpreter(peer, cache), peer.worker, *peer.arguments),
        log=folder / f"{peer.name}.log",
        job={**job, **own},
        environment=_variables(job["threads"]),
    )


def _variables(threads: int) -> dict[str, str]:
    """The worker's environment: as many threads for all, nothing fetched, nothing reported."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    switches = (
        *("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "ORT_DISABLE_TELEMETRY"),
        *("HF_HUB_DISABLE_PROGRESS_BARS", "PYTHONNOUSERSITE"),
    )
    return {**kept, **counts, **dict.fromkeys(switches, "1")}
