"""The engines of a pipeline, opened side by side, closed together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import TYPE_CHECKING, Self

from sd_engines.choice import fastest_engine
from sd_engines.closing import Closing
from sd_engines.engine import open_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from sd_engines.bundle import Bundle
    from sd_engines.engine import Engine


class EngineSet(Closing):
    """Open engines by component."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = dict(engines)

    @classmethod
    def open(
        cls, bundle: Bundle, components: Sequence[str], *, backend: str, threads: int | None
    ) -> Self:
        """Open each component's engine, as `open_engine` does: while one is hashed, another reads.

        ``backend`` "auto" prefers the one whose UNet is fastest here.
        """
        prefer = fastest_engine(bundle, "unet", threads=threads) if backend == "auto" else None
        opened: dict[str, Engine] = {}

        def open_one(component: str) -> None:
            opened[component] = open_engine(
                bundle, component, backend=backend, threads=threads, prefer=prefer
            )

        try:
            _side_by_side(open_one, [(component,) for component in components])
        except BaseException:
            cls(opened).close()
            raise
        return cls({component: opened[component] for component in components})

    def __getitem__(self, component: str) -> Engine:
        return self.engines[component]

    def close(self) -> None:
        """Free all engines; twice is allowed."""
        for engine in self.engines.values():
            engine.close()


def _side_by_side(call: Callable[..., object], arguments: Sequence[tuple[object, ...]]) -> None:
    """Make all calls, each in a thread, and wait for all; raises the first one's error."""
    pool = ThreadPoolExecutor(len(arguments))
    futures: list[Future[object]] = [pool.submit(call, *values) for values in arguments]
    try:
        # An interrupt is to arrive here, not in the threads' join: Python 3.11 takes a thread whose
        # join was interrupted for ended, and a backend that is cut off in C++ aborts the process.
        wait(futures)
    finally:
        for _ in as_completed(futures):
            pass
        pool.shutdown()
    for future in futures:
        future.result()
