"""Pictures drawn by the workers of a Ray cluster: one Ray Data job, each worker with its engines.

A worker may be killed at any moment. Ray starts another and gives it the batch anew; whoever has
a batch draws only those of its pictures that are not in the folder yet.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sd_engines.errors import BackendError, ConfigError, SdError
from sd_runtime.picture_job import Drawn, draw_batch
from sd_runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sd_engines.spec import Precision
    from sd_runtime.lora import Lora
    from sd_runtime.picture_job import PictureBatch

Row = Mapping[str, Any]
"""A row of the data set: a pickled batch in; a picture's `Drawn`, or a pickled error, out."""


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """Where the work is done. Paths are absolute and lie where every machine sees them.

    ``workers`` None: one for each GPU of the cluster, or else for each of its machines.
    ``threads`` is cores a worker, None for an equal share of all.
    """

    bundle: Path
    folder: Path
    backend: str
    precision: Precision | None
    threads: int | None
    loras: tuple[Lora, ...]
    workers: int | None


def draw_by_ray(job: RayJob, batches: Sequence[PictureBatch]) -> Iterator[Drawn]:
    """Draw ``batches`` on the cluster that ``$RAY_ADDRESS`` names, else on one of this machine.

    Gives each picture once, in whatever order they are done. Raises what a worker raises, and
    `BackendError` where Ray fails; the others' pictures stay in the folder.
    """
    with _connected() as ray:
        job = _shared_out(job, ray)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        rows = ray.data.from_items(
            [{"batch": pickle.dumps(batch)} for batch in batches], override_num_blocks=len(batches)
        ).flat_map(
            Worker,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(size=job.workers),
            num_gpus=gpus,
            num_cpus=0 if gpus else job.threads,
        )
        try:
            for row in rows.iter_rows():
                if row["error"] is not None:
                    raise pickle.loads(row["error"])  # noqa: S301 - our own worker's
                yield Drawn(row["name"], row["flagged"])
        except ray.exceptions.RayError as error:
            raise BackendError(
                f"Ray failed: {error}", "The same command goes on with the pictures that are left."
            ) from error


class Worker:
    """A process of the cluster, and the pipeline that it opens for its first batch."""

    def __init__(self, job: RayJob) -> None:
        self._job = job
        self._pipeline: Pipeline | None = None

    def __call__(self, row: Row) -> list[Row]:
        """Draw what is not there yet of the batch in ``row``; one row a picture."""
        batch: PictureBatch = pickle.loads(row["batch"])  # noqa: S301 - our own driver's
        left = tuple(picture for picture in batch if not picture.is_in(self._job.folder))
        drawn = {picture.name: Drawn(picture.name, None) for picture in batch}
        try:
            if left:
                drawn |= {one.name: one for one in self._draw(left)}
        except SdError as error:
            return [{"name": "", "flagged": None, "error": pickle.dumps(error)}]
        return [{"name": d.name, "flagged": d.flagged, "error": None} for d in drawn.values()]

    def _draw(self, batch: PictureBatch) -> list[Drawn]:
        if self._pipeline is None:
            self._pipeline = Pipeline.load(
                self._job.bundle,
                backend=self._job.backend,
                precision=self._job.precision,
                threads=self._job.threads,
                loras=self._job.loras,
            )
        return draw_batch(self._pipeline, batch, self._job.folder)


@contextmanager
def _connected() -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise BackendError(
            f"--ray needs {error.name}, which is not installed", 'pip install "sd-toolkit[ray]"'
        ) from error
    on_sigterm = signal.getsignal(signal.SIGTERM)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr), ExitStack() as stack:  # Ray tells of its dead on stdout
        stack.callback(ray.shutdown)
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BackendError(
                f"no Ray cluster answers: {error}",
                "Check RAY_ADDRESS and RAY_AUTH_TOKEN, or unset them: one is started here then.",
            ) from error
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in its place
        yield ray


def _shared_out(job: RayJob, ray: Any) -> RayJob:
    """``job`` with its workers counted and the cluster's cores divided among them."""
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    workers = job.workers or gpus or sum(node["Alive"] for node in ray.nodes())
    threads = job.threads or (None if gpus else max(1, cpus // workers))
    if workers > (gpus or cpus // (threads or 1)):
        raise ConfigError(
            f"{workers} workers of {threads or 0} cores do not fit into the cluster, "
            f"which has {cpus} cores and {gpus} GPUs",
            "Give fewer --workers or --threads.",
        )
    return replace(job, workers=workers, threads=threads)
