"""Which of a bundle's engines ``auto`` takes: the fastest measured on this machine, remembered.

Speed never costs digits: only engines of one precision compete, that of the first engine in the
order of `BACKENDS` which can run here. What was measured is kept in a small file per bundle,
machine and set of versions below ``$XDG_CACHE_HOME/sd-toolkit``; without it, it is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Final, NamedTuple

from sd_engines.cache import cached_file, read_cached, write_cached
from sd_engines.cores import usable_cores
from sd_engines.engine import check_engine, listed_engines, open_engine
from sd_engines.errors import BackendError, EngineMismatchError
from sd_engines.kernel_file import kernel_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sd_engines.bundle import Bundle
    from sd_engines.engine import Binding
    from sd_engines.entries import EngineEntry
    from sd_engines.spec import Precision

logger = logging.getLogger(__name__)

_BUDGET_S: Final = 5.0
"""A candidate runs again until this is spent; one that is slower runs once."""
_MOST_RUNS: Final = 10
_MEASURING = Lock()
"""Two pipelines that open at once would measure each other."""


class Pace(NamedTuple):
    """What one engine takes here: to open for a guided picture, and to run on one."""

    open_ms: float
    run_ms: float

    def cost_ms(self, runs: int | None) -> float:
        """What so many runs cost, opening among it; None: of one run among many."""
        return self.run_ms if runs is None else self.open_ms + runs * self.run_ms


def fastest_engine(
    bundle: Bundle,
    component: str,
    *,
    threads: int | None = None,
    precision: Precision | None = None,
    runs: int | None = None,
) -> EngineEntry | None:
    """The engine of ``component`` that ``auto`` is to take here; None where none can run.

    That is the one which is done first with ``runs`` runs, or where their number is not known the
    one that runs fastest: what compiles long gains nothing in a process of a single picture.

    The first call for a bundle on a machine opens the candidates one after the other and runs
    each on one guided picture; where only one can run, nothing is measured. ``precision`` None is
    any but fp8 and int8, unless there is nothing else. `BundleError` for an altered bundle,
    `ConfigError` for ``threads`` below 1.
    """
    entries = listed_engines(bundle, component, precision=precision)
    if len(entries) < 2:
        return entries[0] if entries else None
    with _MEASURING:
        path = _memory_path(entries, threads or usable_cores())
        if remembered := _recall(path, entries):
            best = _soonest(entries, remembered, runs)
            with suppress(BackendError, EngineMismatchError):
                check_engine(bundle, best)
                return best
        candidates, warnings = _candidates(bundle, entries)
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        logger.info(
            "Measuring once which is fastest here: %s", ", ".join(e.backend for e in candidates)
        )
        paces: dict[str, Pace] = {}
        for entry in candidates:
            try:
                pace = paces[entry.key] = _pace(bundle, entry, threads)
            except (BackendError, EngineMismatchError) as error:
                warnings.append(f"{component}: {entry.backend} was not measured: {error.message}")
                logger.warning(warnings[-1])
            else:
                words = "%s: %.4g ms by %s, which opens in %.4g ms"
                logger.info(words, component, pace.run_ms, entry.backend, pace.open_ms)
        if not paces:
            return None
        _remember(path, paces, warnings)
        return _soonest(candidates, paces, runs)


def _soonest(
    entries: Sequence[EngineEntry], paces: Mapping[str, Pace], runs: int | None
) -> EngineEntry:
    """That of ``entries`` which is done first; those without a pace take no part."""
    measured = [entry for entry in entries if entry.key in paces]
    return min(measured, key=lambda entry: paces[entry.key].cost_ms(runs))


def _candidates(
    bundle: Bundle, entries: Sequence[EngineEntry]
) -> tuple[list[EngineEntry], list[str]]:
    """The engines that can run here, of the first one's precision; what to warn of whenever."""
    candidates: list[EngineEntry] = []
    warnings = []
    for entry in entries:
        if candidates and entry.precision != candidates[0].precision:
            continue
        try:
            check_engine(bundle, entry)
            candidates.append(entry)
        except (BackendError, EngineMismatchError) as error:
            message = f"{entry.component}: no {entry.backend} engine here: {error.message}"
            if isinstance(error, EngineMismatchError):
                warnings.append(message)
                logger.warning(message)
            else:
                logger.info(message)
    return candidates, warnings


def _pace(bundle: Bundle, entry: EngineEntry, threads: int | None) -> Pace:
    """What opening ``entry`` took, and the shortest of its first runs on one guided picture.

    `BackendError` where another of its backend opens in its place.
    """
    start = perf_counter()
    with open_engine(
        bundle,
        entry.component,
        backend=entry.backend,
        precision=entry.precision,
        threads=threads,
        prefer=entry,
    ) as engine:
        if engine.entry != entry:
            raise BackendError(
                f"{entry.backend} does not start on {entry.target}",
                f"Name another: --backend {engine.entry.backend}.",
            )
        profile = bundle.manifest.profile
        batch = profile.max_batch(entry.component, engine.inputs.values())
        binding = engine.bind(min(2, batch), pictures=1)
        open_ms = 1e3 * (perf_counter() - start)
        return Pace(open_ms, _shortest_run_ms(binding))


def _shortest_run_ms(binding: Binding) -> float:
    for array in binding.inputs.values():
        array[...] = 1
    output = next(iter(binding.outputs.values()))
    runs_s: list[float] = []
    while len(runs_s) < _MOST_RUNS and sum(runs_s) < _BUDGET_S:
        start = perf_counter()
        binding.run()
        float(output[(0,) * output.ndim])  # on a GPU, waits for the run
        runs_s.append(perf_counter() - start)
    return 1e3 * min(runs_s)


def _memory_path(entries: Sequence[EngineEntry], threads: int) -> Path | None:
    """Where the choice among ``entries`` is kept; None where the user has no home.

    The name changes with all that moves a latency: graphs, precisions, versions, the machine.
    """
    situation = {
        "engines": [entry.key for entry in entries],
        "packages": [_installed(entry.backend) for entry in entries],
        "machine": _machine(),
        "threads": threads,
    }
    digest = hashlib.sha256(json.dumps(situation).encode()).hexdigest()
    return cached_file(f"auto-{digest[:32]}.json")


def _installed(backend: str) -> list[str]:
    """What pip says is installed for ``backend``, without an import of it or of pip's metadata."""
    module = backend.replace("-", "_")
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return []
    packages = Path(spec.origin).parents[1]
    return [spec.origin, *sorted(path.name for path in packages.glob(f"{module}*.dist-info"))]


def _machine() -> list[str]:
    """The processor, the GPUs and their driver."""
    first_of_many = kernel_text("/proc/cpuinfo", limit=4096)
    processor = re.findall(r"^(?:model name|CPU part)\s*:.*", first_of_many, re.MULTILINE)
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
    return [
        platform.machine(),
        *processor[:1],
        kernel_text("/proc/driver/nvidia/version"),
        *(line for gpu in gpus for line in kernel_text(gpu / "information").splitlines()[:1]),
        os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    ]


def _recall(path: Path | None, entries: Sequence[EngineEntry]) -> dict[str, Pace]:
    """What ``path`` remembers of ``entries``, by key, its warnings repeated; nothing if unknown."""
    try:
        memory = json.loads(read_cached(path))
        known = {entry.key for entry in entries}
        paces = {
            key: Pace(float(pace["open_ms"]), float(pace["run_ms"]))
            for key, pace in memory["paces"].items()
            if key in known
        }
        warnings = [str(warning) for warning in memory["warnings"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    for warning in warnings:
        logger.warning("%s", warning)
    return paces


def _remember(path: Path | None, paces: Mapping[str, Pace], warnings: Sequence[str]) -> None:
    memory = {
        "paces": {key: pace._asdict() for key, pace in paces.items()},
        "warnings": warnings,
    }
    if not write_cached(path, (json.dumps(memory, indent=1) + "\n").encode()):
        logger.info(
            "The next start measures again: it cannot be kept. Let XDG_CACHE_HOME name a folder "
            "that can be written to."
        )
