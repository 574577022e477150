"""The Engine protocol: one compiled component behind named arrays; who builds and opens it."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeAlias, get_args

from sd_engines.build_command import missing_engine_hint
from sd_engines.entries import BACKENDS
from sd_engines.errors import BackendError, BundleError, ConfigError, EngineMismatchError, nearest
from sd_engines.spec import LOSSY, Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path
    from types import ModuleType, TracebackType

    from numpy.typing import NDArray

    from sd_engines.border import Rows
    from sd_engines.bundle import Bundle
    from sd_engines.entries import ComponentEntry, EngineEntry
    from sd_engines.spec import Profile, TensorSpec

logger = logging.getLogger(__name__)

_MOST_THREADS: Final = 1024

Array: TypeAlias = Any
"""A numpy array on the CPU; a CuPy array where the engine's device is a GPU."""


Progress: TypeAlias = "Callable[[str, int, int], None]"
"""Called with a build's phase, its steps done and its steps in all; may raise to stop the build."""


class Binding(Protocol):
    """Fixed buffers of one batch: write the inputs in place, run, read the outputs in place."""

    @property
    def inputs(self) -> Mapping[str, Array]:
        """The input buffers by name; `run` reads them."""

    @property
    def outputs(self) -> Mapping[str, Array]:
        """The output buffers by name; `run` overwrites them."""

    def run(self) -> None:
        """Run the engine from ``inputs`` into ``outputs``; on a GPU, enqueue it only."""


class Engine(Protocol):
    """One compiled component. Thread-compatible: one caller at a time per Binding."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What goes in, by name."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What comes out, by name."""

    @property
    def entry(self) -> EngineEntry:
        """What the manifest says of it: backend, version, target, precision, key."""

    def bind(self, batch: int, *, pictures: int | None = None) -> Binding:
        """Buffers for ``batch`` rows (1 … `Profile.max_batch`), kept and reused.

        ``pictures`` is how many of them share what has an axis `PICTURES`; None: none do.
        """

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run once on named arrays; the results are the caller's own copies."""

    def close(self) -> None:
        """Free the engine and its buffers; calls after it are an error."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def build_engine(
    backend: str,
    onnx_path: Path,
    *,
    output_dir: Path,
    component: str,
    entry: ComponentEntry,
    profile: Profile,
    precision: Precision | None = None,
    target: str | None = None,
    workspace_bytes: int | None = None,
    calibration: str | None = None,
    progress: Progress | None = None,
) -> EngineEntry:
    """Make ``onnx_path`` ready for ``backend``; returns the manifest's entry.

    Built files go to ``output_dir/engines/…``; portable backends write none. ``precision`` None:
    what the backend makes of the graph by default. ``workspace_bytes`` is for those that build
    files, and so is ``calibration``: the digest of what the graph was calibrated on, for the
    engine's key. `ConfigError` for an unknown backend, target or a precision it does not take;
    `BackendError` where the build fails.
    """
    module = _module(backend)
    of_files = {"workspace_bytes": workspace_bytes, "calibration": calibration}
    built: EngineEntry = module.build(
        onnx_path,
        output_dir=output_dir,
        backend=backend,
        component=component,
        entry=entry,
        profile=profile,
        precision=precision,
        target=target,
        progress=progress,
        **{name: value for name, value in of_files.items() if value is not None},
    )
    return built


def default_target(backend: str) -> str:
    """What `build_engine` takes for ``target`` where it is None.

    `BackendError` where that is this machine's GPU and there is none.
    """
    target: str = _module(backend).default_target(backend)
    return target


def load_engine(
    path: Path,
    *,
    component: ComponentEntry,
    engine: EngineEntry,
    max_batch: int,
    threads: int | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> Engine:
    """Load the file at ``path`` with no bundle around it; its bytes are taken on trust.

    For what this process built itself; `open_engine` is for everybody else. ``weights`` take the
    place of the graph's own initializers of the same names, and are kept. `BackendError` where
    the backend does not start, `ConfigError` where its weights cannot be changed.
    """
    if weights and engine.is_built:
        raise ConfigError(
            f"the weights of an engine of {engine.backend} are built into it",
            "Fuse the LoRA instead: sd-export … --lora FILE; or name another --backend, "
            "or another --precision than int8.",
        )
    more = {"weights": weights} if weights else {}
    loaded: Engine = _module(engine.backend).load(
        path, component=component, engine=engine, max_batch=max_batch, threads=threads, **more
    )
    return loaded


def open_engine(
    bundle: Bundle,
    component: str,
    *,
    backend: str = "auto",
    threads: int | None = None,
    precision: Precision | None = None,
    prefer: EngineEntry | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
    batches: Collection[Rows] = (),
) -> Engine:
    """Open ``component`` of ``bundle``, its bytes checked; ``weights`` as in `load_engine`.

    It is bound for ``batches``, each of rows and of the pictures that they belong to, so that
    what compiles for them has done so.

    ``backend`` "auto" takes the first of the bundle's engines, in the order of `BACKENDS`, that is
    installed, made for this machine and opens; ``prefer`` and its backend's others go before all,
    and `sd_engines.choice.fastest_engine` says which. ``precision`` None takes the first listed,
    and what is `LOSSY` only where nothing else is: `listed_engines`.
    `ConfigError` for an unknown backend, `BundleError` where the bundle lacks what is asked for,
    `EngineMismatchError` for an engine of another machine or version, `BackendError` where the
    backend does not start.
    """
    if backend != "auto":
        _module(backend)
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise ConfigError(
            f"threads is {threads}", f"Name 1 to {_MOST_THREADS}, or leave it out for all cores."
        )
    if component not in bundle.manifest.components:
        raise BundleError(
            f"{bundle.path}: has no component {component!r}",
            nearest(component, bundle.manifest.components),
        )
    entries = listed_engines(bundle, component, backend=backend, precision=precision)
    if prefer is not None:
        entries.sort(key=lambda entry: (entry != prefer, entry.backend != prefer.backend))
    if not entries:
        asked = (precision, None if backend == "auto" else backend, "engine of", component)
        raise BundleError(
            f"{bundle.path}: has no {' '.join(filter(None, asked))}",
            missing_engine_hint(
                bundle.path,
                bundle.manifest.components[component],
                backend=backend,
                precision=precision,
            ),
        )
    refusals: list[BackendError | EngineMismatchError] = []
    for entry in entries:
        try:
            return _open(bundle, entry, threads, weights, batches)
        except (BackendError, EngineMismatchError) as error:
            refusals.append(error)
            level = logging.WARNING if isinstance(error, EngineMismatchError) else logging.INFO
            logger.log(level, "%s: no %s engine here: %s", component, entry.backend, error.message)
    if len(refusals) == 1:
        raise refusals[0]
    raise BackendError(
        f"no engine of {component} opens here: " + "; ".join(e.message for e in refusals),
        " · ".join(dict.fromkeys(e.hint for e in refusals)),
    ) from refusals[0]


def listed_engines(
    bundle: Bundle, component: str, *, backend: str = "auto", precision: Precision | None = None
) -> list[EngineEntry]:
    """The engines of ``component`` to choose from, in the order of `BACKENDS`.

    GPUs come before the CPU, and what is for a few of them before what is for many.

    With ``precision`` None what is `LOSSY` is left out where there are others: nobody gets it who
    did not ask for it, or make a bundle of nothing else. `ConfigError` for an unknown precision.
    """
    known = get_args(Precision)
    if precision is not None and precision not in known:
        raise ConfigError(f"unknown precision {precision!r}", nearest(precision, known))
    entries = [
        entry
        for entry in bundle.manifest.engines
        if entry.component == component
        and backend in ("auto", entry.backend)
        and precision in (None, entry.precision)
    ]
    if precision is None:
        entries = [entry for entry in entries if entry.precision not in LOSSY] or entries
    return sorted(entries, key=lambda entry: (BACKENDS.index(entry.backend), entry.breadth))


def check_engine(bundle: Bundle, entry: EngineEntry) -> None:
    """Whether ``entry`` can run here, as far as can be told without its file.

    `EngineMismatchError` for an engine of another machine or version, `BackendError` where the
    backend or its device is not here.
    """
    _module(entry.backend).check(entry, bundle_path=bundle.path)


def _open(
    bundle: Bundle,
    entry: EngineEntry,
    threads: int | None,
    weights: Mapping[str, NDArray[Any]] | None,
    batches: Collection[Rows],
) -> Engine:
    check_engine(bundle, entry)  # hashing takes seconds
    component = bundle.manifest.components[entry.component]
    with ExitStack() as opening:
        with bundle.verifying(entry) as path:
            engine = opening.enter_context(
                load_engine(
                    path,
                    component=component,
                    engine=entry,
                    max_batch=bundle.manifest.profile.max_batch(entry.component, component.inputs),
                    threads=threads,
                    weights=weights,
                )
            )
            for rows, pictures in batches:
                engine.bind(rows, pictures=pictures)
        opening.pop_all()
    return engine


def _module(backend: str) -> ModuleType:
    """The module that builds and loads engines of ``backend``; its package is imported later."""
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}", nearest(backend, BACKENDS))
    name = "tensorrt" if backend.startswith("tensorrt") else backend
    return import_module(f"sd_engines.backends.{name}")
