"""The engines of a pipeline, opened side by side and made ready for a first request."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import TYPE_CHECKING, Any

from sd_engines.choice import fastest_engine
from sd_engines.cores import usable_cores
from sd_engines.engine import listed_engines, open_engine
from sd_engines.errors import BundleError
from sd_engines.node import REMAKE_HINT
from sd_engines.spec import (
    CONTROL_EMBEDDING,
    CONTROLNET,
    TEXT_ENCODERS,
    TIME_IDS,
)
from sd_runtime.lora import fused_weights
from sd_runtime.task import DEPTH_ESTIMATOR, ENCODER, IMAGE_ENCODER, reads_image, unet_inputs
from sd_runtime.work_stream import NO_STREAM

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from concurrent.futures import Future

    from sd_engines.border import Rows
    from sd_engines.bundle import Bundle
    from sd_engines.engine import Engine
    from sd_engines.manifest import Manifest
    from sd_engines.spec import Precision
    from sd_runtime.lora import Lora
    from sd_runtime.plan import Plan
    from sd_runtime.work_stream import WorkStream


_ON_DEMAND = (ENCODER, DEPTH_ESTIMATOR, "unet_shallow", CONTROLNET, CONTROL_EMBEDDING)
"""How the names of components begin that not every request needs."""


def text_encoders(manifest: Manifest) -> tuple[str, ...]:
    """The components that read this bundle's prompts, in the order of `TEXT_ENCODERS`.

    Those that it must have, where it has none: one, or of Stable Diffusion XL the second; none
    where it reads a picture.
    """
    if reads_image(manifest):
        return ()
    present = manifest.components
    needed = TEXT_ENCODERS[-1:] if TIME_IDS in unet_inputs(manifest) else TEXT_ENCODERS[:1]
    return tuple(name for name in TEXT_ENCODERS if name in present or name in needed)


def drawing_components(manifest: Manifest) -> tuple[str, ...]:
    """The components without which no picture is drawn; the bundle may lack them."""
    readers = text_encoders(manifest) or (IMAGE_ENCODER,)
    return (*readers, "unet", "vae_decoder")


def components_to_open(bundle: Bundle, batches: Mapping[str, Collection[Rows]]) -> list[str]:
    """What every picture is drawn with, and what only those of ``batches`` need.

    `BundleError` where the bundle lacks what every picture needs.
    """
    present, needed = bundle.manifest.components, drawing_components(bundle.manifest)
    for component in needed:
        if component not in present:
            raise BundleError(f"the bundle {bundle.path} has no {component}", REMAKE_HINT)
    names = [*needed]
    if "safety_checker" in present:
        names.append("safety_checker")
    return names + [name for name, rows in batches.items() if rows and name.startswith(_ON_DEMAND)]


def first_batches(plan: Plan, manifest: Manifest) -> dict[str, set[Rows]]:
    """By component: how many rows its engine answers at once for the first pictures of ``plan``.

    And of how many pictures they are.
    """
    pictures = min(plan.num_drawn, manifest.profile.batch_size)
    samples = {
        row: (pictures * (2 if row in plan.guided_rows else 1), pictures)
        for row in range(plan.table.num_rows)
    }
    one = (1, 1)
    readers = text_encoders(manifest) or (IMAGE_ENCODER,)
    upscales_pixels = plan.upscaling is not None and plan.upscaling.level is not None
    encodes = plan.request.image is not None and not (plan.task.reads_image or upscales_pixels)
    estimates = plan.task.feeds_depth and plan.request.depth_map is None
    return {
        **({ENCODER: {one}} if encodes else {}),  # one at a time: `ImageEncoder`
        **({DEPTH_ESTIMATOR: {one}} if estimates else {}),
        **{control.component: {samples[row] for row in control.rows} for control in plan.controls},
        **{control.embedding: {one} for control in plan.controls},  # too: `ControlEncoder`
        **{name: {one} for name in readers},  # each text on its own row: `PromptEncoder`
        "unet": {batch for row, batch in samples.items() if row not in plan.shallow_rows}
        | ({(pictures, pictures)} if plan.safety else set()),
        "unet_shallow": {samples[row] for row in plan.shallow_rows},
        "vae_decoder": {(pictures, pictures)},
        "safety_checker": {(pictures, pictures)},
    }


def open_engines(
    bundle: Bundle,
    components: Collection[str],
    *,
    backend: str,
    threads: int | None,
    precision: Precision | None = None,
    num_steps: int | None = None,
    batches: Mapping[str, Collection[Rows]],
    loras: Sequence[Lora] = (),
    stream: WorkStream = NO_STREAM,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[str, Engine]:
    """Open each component's engine, as `open_engine` does, and bind it for its ``batches``.

    ``loras`` are put on them. Side by side: while one is hashed another is compiled, and
    ``meanwhile`` runs in a thread beside them.

    ``backend`` "auto" prefers the one whose UNet is fastest here, or is done first with
    ``num_steps`` calls. ``precision`` is the UNet's, and that of others which have it. All is done
    within ``stream``, as of `work_stream`.
    All engines are open, or none.
    """
    prefer, graphs = None, bundle.manifest.components
    if backend == "auto":
        with stream:
            prefer = fastest_engine(
                bundle, "unet", threads=threads, precision=precision, runs=num_steps
            )

    def open_bound(component: str) -> Engine:
        asked = component == "unet" or listed_engines(
            bundle, component, backend=backend, precision=precision
        )
        with stream:
            return open_engine(
                bundle,
                component,
                backend=backend,
                threads=threads,
                precision=precision if asked else None,
                prefer=prefer,
                weights=fused_weights(bundle, component, loras),
                batches=batches.get(component, ()),
            )

    # As many at a time as there are cores, the largest first: it is done last, and others that want
    # its core would make it later.
    pool = ThreadPoolExecutor(min(len(components) + 1, usable_cores()))
    opening = {
        component: pool.submit(open_bound, component)
        for component in sorted(components, key=lambda name: -graphs[name].bytes)
    }
    rest: Future[Any] = pool.submit(meanwhile)
    try:
        # An interrupt is to arrive here, not in the threads' join: Python 3.11 takes a thread whose
        # join was interrupted for ended, and a backend that is cut off in C++ aborts the process.
        wait([*opening.values(), rest])
        engines = {component: opening[component].result() for component in components}
        rest.result()
        return engines
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for future in as_completed(f for f in opening.values() if not f.cancelled()):
            if future.exception() is None:
                future.result().close()
        raise
    finally:
        pool.shutdown()
