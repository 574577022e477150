"""The engines of a pipeline, opened side by side and made ready for a first request."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import TYPE_CHECKING

from sd_engines.choice import fastest_engine
from sd_engines.engine import listed_engines, open_engine
from sd_runtime.lora import fused_weights
from sd_runtime.task import ENCODER

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from sd_engines.bundle import Bundle
    from sd_engines.engine import Engine
    from sd_engines.spec import Precision, Profile
    from sd_runtime.lora import Lora
    from sd_runtime.plan import Plan


def first_batches(plan: Plan, profile: Profile) -> dict[str, set[int]]:
    """By component: how many rows its engine answers at once for the first pictures of ``plan``."""
    pictures = min(plan.request.num_images, profile.batch_size)
    samples = {
        row: pictures * (2 if row in plan.guided_rows else 1) for row in range(plan.table.num_rows)
    }
    encoder = {} if plan.request.image is None else {ENCODER: {1}}  # one at a time: `ImageEncoder`
    controls = {
        control.component: {samples[row] for row in control.rows} for control in plan.controls
    }
    embeddings = {control.embedding: {1} for control in plan.controls}  # so: `ControlEncoder`
    return (
        encoder
        | controls
        | embeddings
        | {
            "text_encoder": {1},  # each text on its own row: `PromptEncoder`
            "unet": {batch for row, batch in samples.items() if row not in plan.shallow_rows},
            "unet_shallow": {samples[row] for row in plan.shallow_rows},
            "vae_decoder": {pictures},
            "safety_checker": {pictures},
        }
    )


def open_engines(
    bundle: Bundle,
    components: Collection[str],
    *,
    backend: str,
    threads: int | None,
    precision: Precision | None = None,
    batches: Mapping[str, Collection[int]],
    loras: Sequence[Lora] = (),
) -> dict[str, Engine]:
    """Open each component's engine, as `open_engine` does, and bind it for its ``batches``.

    ``loras`` are put on them.

    While one is hashed another is read, and while one is compiled another is. ``backend`` "auto"
    prefers the one whose UNet is fastest here. ``precision`` is the UNet's, and that of others
    which have it. All engines are open, or none.
    """
    prefer = None
    if backend == "auto":
        prefer = fastest_engine(bundle, "unet", threads=threads, precision=precision)

    def open_bound(component: str) -> Engine:
        asked = component == "unet" or listed_engines(
            bundle, component, backend=backend, precision=precision
        )
        engine = open_engine(
            bundle,
            component,
            backend=backend,
            threads=threads,
            precision=precision if asked else None,
            prefer=prefer,
            weights=fused_weights(bundle, component, loras),
        )
        try:
            for batch in batches.get(component, ()):
                engine.bind(batch)
        except BaseException:
            engine.close()
            raise
        return engine

    pool = ThreadPoolExecutor(len(components))
    opening = {component: pool.submit(open_bound, component) for component in components}
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
