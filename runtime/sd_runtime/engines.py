"""The engines of a pipeline, opened side by side."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import TYPE_CHECKING

from sd_engines.choice import fastest_engine
from sd_engines.engine import open_engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_engines.bundle import Bundle
    from sd_engines.engine import Engine


def open_engines(
    bundle: Bundle, components: Sequence[str], *, backend: str, threads: int | None
) -> dict[str, Engine]:
    """Open each component's engine, as `open_engine` does: while one is hashed, another is read.

    ``backend`` "auto" prefers the one whose UNet is fastest here. All engines are open, or none.
    """
    prefer = fastest_engine(bundle, "unet", threads=threads) if backend == "auto" else None
    pool = ThreadPoolExecutor(len(components))
    opening = {
        component: pool.submit(
            open_engine, bundle, component, backend=backend, threads=threads, prefer=prefer
        )
        for component in components
    }
    try:
        # An interrupt is to arrive here, not in the threads' join: Python 3.11 takes a thread whose
        # join was interrupted for ended, and a backend that is cut off in C++ aborts the process.
        wait(opening.values())
        return {component: future.result() for component, future in opening.items()}
    except BaseException:
        for future in as_completed(opening.values()):
            if future.exception() is None:
                future.result().close()
        raise
    finally:
        pool.shutdown()
