"""A load: one request, or several at once, on a bundle; how long it takes and what it holds.

Peak memory never falls while a process lives, so each load's is that of a process of its own:
``python -m sd_bench.load`` reads a load as JSON and prints the bytes. Of engines on a GPU it is the
memory there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from threading import Barrier
from typing import TYPE_CHECKING

from sd_bench.gpu_memory import gpu_memory_bytes, held_on_gpus_bytes
from sd_bench.latency import Sampler, open_pipeline
from sd_bench.measurement import Settings
from sd_engines.errors import BackendError, SdError
from sd_engines.memory import peak_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_bench.measurement import Sample
    from sd_runtime import Pipeline


@dataclass(frozen=True, kw_only=True)
class Load:
    """``requests`` times the request of ``settings`` at once, each on a pipeline of its own."""

    bundle: str
    settings: Settings
    requests: int = 1

    def open_pipelines(self, stack: ExitStack, opened: list[Pipeline]) -> None:
        """Add to ``opened``, pipelines of this bundle and size, until all requests have one.

        ``stack`` closes them. Raises as `Pipeline.load` does.
        """
        while len(opened) < self.requests:
            pipeline = open_pipeline(self.bundle, self.settings)
            opened.append(stack.enter_context(pipeline))

    def samplers(self, pipelines: Sequence[Pipeline]) -> list[Sampler]:
        """One sampler for each request. Raises as `Sampler` does."""
        return [Sampler(pipeline, self.settings) for pipeline in pipelines[: self.requests]]


def sample_at_once(samplers: Sequence[Sampler]) -> list[Sample]:
    """One sample of each, all begun at the same moment. Raises as `Sampler.sample` does."""
    start = Barrier(len(samplers))

    def sample(sampler: Sampler) -> Sample:
        start.wait()
        return sampler.sample()

    with ThreadPoolExecutor(len(samplers)) as pool:
        return list(pool.map(sample, samplers))


def measure_peak_memory(load: Load) -> int:
    """Bytes that a new process holds at most while it opens ``load``'s bundle and answers it once.

    Python and what it imports are in it; of engines on a GPU the memory there, and nothing else.
    `BackendError` where the process fails.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sd_bench.load"],
        input=json.dumps(asdict(load)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise BackendError(
            f"the process that measures memory failed: {words[0]}",
            "Check the memory that is free, or measure smaller loads.",
        )
    return int(done.stdout)


def main() -> None:
    """Answer the load on stdin, and print the most bytes that it took."""
    fields = json.load(sys.stdin)
    load = Load(**{**fields, "settings": Settings(**fields["settings"])})
    pipelines: list[Pipeline] = []
    held_before = held_on_gpus_bytes()
    try:
        with ExitStack() as stack:
            load.open_pipelines(stack, pipelines)
            sample_at_once(load.samplers(pipelines))
            engines = pipelines[0].engines.values()
            on_gpu = gpu_memory_bytes(engines, before=held_before)
            sys.stdout.write(f"{on_gpu or peak_memory_bytes()}\n")
    except SdError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
