"""Adds engines to a bundle from the ONNX inside it; the checkpoint is not needed."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from sd_engines.bundle import PORTABLE_BACKENDS, open_bundle
from sd_engines.engine import default_target
from sd_engines.errors import BundleError
from sd_engines.seal import add_engines
from sd_export.graph_proof import bundle_proof, check_prover
from sd_export.precision import check_request, engine_precision
from sd_export.progress import StageLog, silent
from sd_export.proven_engine import EngineOrder, recorded_engine
from sd_export.work import backend_version, work_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_engines.bundle import Bundle, CertificateEntry, EngineEntry
    from sd_engines.manifest import Manifest
    from sd_engines.spec import Precision
    from sd_export.progress import Progress
    from sd_export.work import WorkFolder


def build(
    bundle_path: str | Path,
    *,
    backends: Sequence[str],
    precision: Precision | None = None,
    target: str | None = None,
    workspace_bytes: int | None = None,
    calibration_prompts: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Add engines of ``backends`` to a bundle, from the ONNX inside; its new manifest.

    ``target`` is the backend's word for what the engine is to run on: ``cuda`` for ONNX Runtime,
    ``sm89`` or ``sm86+sm120`` for TensorRT-RTX; None takes its default. The reference of their
    certificate is the bundle's own ONNX in ONNX Runtime. ``workspace_bytes`` is the most that a
    layer of a TensorRT engine may work in. ``calibration_prompts`` are what an int8
    or fp8 engine draws to be calibrated; None takes `calibration.PROMPTS`. Raises `ConfigError`,
    `BundleError`, `BackendError`, or `ExportError` where an engine misses its tolerance; the bundle
    is then as it was.
    """
    backends = tuple(dict.fromkeys(backends))
    check_request(backends, precision, calibration_prompts, workspace_bytes, target=target)
    check_prover()
    path = Path(bundle_path).resolve()
    open_bundle(path)  # says why where it is none, before a work folder is made beside it
    _check_writable(path)
    log = StageLog(progress)
    with work_folder(path, waiting=lambda: log.skipped("bundle", "wait")) as work:
        bundle = open_bundle(path)
        for component, entry in bundle.manifest.components.items():
            for backend in backends:  # says so before anything is built where it cannot be
                engine_precision(
                    component, backend, entry=entry, precision=precision, target=target
                )
        built: set[str] = set()
        made = []
        for profile in [size.profile for size in bundle.manifest.all_sizes]:
            sized = bundle.at(profile.height, profile.width)
            graphs = sized.manifest.components
            engines, certificate = _missing_engines(
                sized,
                [component for component, entry in graphs.items() if entry.file not in built],
                backends=backends,
                precision=precision,
                target=target,
                workspace_bytes=workspace_bytes,
                calibration_prompts=calibration_prompts,
                work=work,
                log=log.about(f"{profile.width}x{profile.height}") if built else log,
            )
            built |= {entry.file for entry in graphs.values()}
            if engines:
                made.append((profile, engines, certificate))
        manifest = bundle.manifest
        for profile, engines, certificate in made:
            with log.stage("bundle", "seal"):
                manifest = add_engines(
                    path,
                    work.bundle,
                    engines=engines,
                    certificate=certificate,
                    height=profile.height,
                    width=profile.width,
                )
        return manifest


def _check_writable(path: Path) -> None:
    """`BundleError` where nothing can be added to the bundle at ``path``, before it is built."""
    for folder in (path, path / "engines"):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise BundleError(
                f"{folder} is not writable, so no engine can be added",
                f"chmod -R u+w {quote(str(path))}, or build in a copy of it.",
            )


def _missing_engines(
    bundle: Bundle,
    components: Sequence[str],
    *,
    backends: Sequence[str],
    precision: Precision | None,
    target: str | None,
    workspace_bytes: int | None,
    calibration_prompts: Sequence[str] | None,
    work: WorkFolder,
    log: StageLog,
) -> tuple[list[EngineEntry], list[CertificateEntry]]:
    """Engines that ``bundle`` lacks for its own size, and what was measured of them."""
    from sd_export.calibration import calibration_for  # and numpy, which --help does without

    calibration = calibration_for(precision, bundle.path, bundle.manifest, calibration_prompts)
    engines: list[EngineEntry] = []
    certificate: list[CertificateEntry] = []
    for component in components:
        entry = bundle.manifest.components[component]
        with log.stage(component, "check") as result:
            bundle.verified_path(component)
            result.bytes = entry.bytes
        proof = cache(partial(bundle_proof, bundle, component))
        for backend in backends:
            order = EngineOrder(
                backend=backend,
                component=component,
                entry=entry,
                profile=bundle.manifest.profile,
                precision=engine_precision(
                    component, backend, entry=entry, precision=precision, target=target
                ),
                target=target,
                workspace_bytes=workspace_bytes,
                calibration=calibration,
            )
            if _is_there(bundle, order):
                log.skipped(component, f"build {backend}", detail="already there")
                continue
            engine, measured = recorded_engine(
                work, order, bundle.path / entry.file, proof=proof, log=log
            )
            engines.append(engine)
            certificate += measured
    return engines, certificate


def _is_there(bundle: Bundle, order: EngineOrder) -> bool:
    """Whether the bundle has this engine already, of the version that is installed, unaltered.

    And as it was calibrated, where it is one that is, and built in as much memory, where that is
    given.
    """
    precision, calibration = order.precision or order.entry.precision, order.calibration
    wanted = (order.component, order.backend, precision)
    installed, limit = backend_version(order.backend), order.workspace_bytes
    target = order.target or default_target(order.backend)
    for engine in bundle.manifest.engines:
        if (engine.component, engine.backend, engine.precision) != wanted:
            continue
        if engine.target != target:
            continue
        if limit and engine.flags.get("workspace_bytes") != str(limit):
            continue
        if calibration and engine.flags.get("calibration") not in (None, calibration.digest):
            continue
        try:
            bundle.verified_engine(engine)
        except BundleError:
            continue
        if order.backend in PORTABLE_BACKENDS or engine.version == installed:
            return True
    return False
