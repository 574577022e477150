"""One engine, built from a component's ONNX and compared with what it should compute.

TensorRT computes in the graph's own types, so an engine of fewer digits than the graph is built
from a converted copy, which is checked on the CPU and then dropped: fp16 and fp8 in ONNX Runtime,
bf16 in OpenVINO where it and the processor have that. What OpenVINO runs in 8 bits is made by
`sd_export.int8`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from sd_engines.bundle import PORTABLE_BACKENDS, CertificateEntry, EngineEntry
from sd_engines.engine import build_engine
from sd_engines.errors import BackendError, EngineMismatchError
from sd_export.graph_proof import verify_graph, words_of
from sd_export.half_graph import converted_entry, half_graph
from sd_export.work import key_of, versions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sd_engines.bundle import ComponentEntry
    from sd_engines.spec import Precision, Profile
    from sd_export.calibration import Calibration
    from sd_export.progress import StageLog
    from sd_export.verify import Proof
    from sd_export.work import WorkFolder


@dataclass(frozen=True, kw_only=True)
class EngineOrder:
    """What is asked for: an engine of ``backend`` for ``entry``, the component's ONNX.

    ``precision``, ``target`` and ``workspace_bytes`` as in `build_engine`; ``calibration`` is for
    8 bits.
    """

    backend: str
    component: str
    entry: ComponentEntry
    profile: Profile
    precision: Precision | None
    target: str | None = None
    workspace_bytes: int | None = None
    calibration: Calibration | None = None

    @property
    def key(self) -> str:
        """SHA-256 over all that decides the engine."""
        calibration = self.calibration
        return key_of(
            {
                "graph": asdict(self.entry),
                "precision": self.precision,
                "batch_size": self.profile.batch_size,
                "calibration": calibration.digest if calibration is not None else None,
                "nncf": metadata.version("nncf") if self.precision == "int8" else None,
                "target": self.target,
                "workspace_bytes": self.workspace_bytes,
                "versions": versions((self.backend,)),
            }
        )


def recorded_engine(
    work: WorkFolder,
    order: EngineOrder,
    onnx_path: Path,
    *,
    proof: Callable[[], Proof],
    log: StageLog,
) -> tuple[EngineEntry, list[CertificateEntry]]:
    """`make_engine`, or what an interrupted run recorded of it."""
    stage, key = f"{order.entry.file} {order.backend}", order.key
    done = work.finished(stage, key)
    if done is not None:
        log.skipped(order.component, f"build {order.backend}")
        return EngineEntry(**done["engine"]), [CertificateEntry(**m) for m in done["certificate"]]
    engine, certificate = make_engine(
        order, onnx_path, output_dir=work.bundle, proof=proof, log=log
    )
    built = [f"bundle/{engine.file}"] if engine.is_built else []
    data = {"engine": asdict(engine), "certificate": [asdict(m) for m in certificate]}
    work.finish(stage, key, files=built, data=data)
    return engine, certificate


def make_engine(
    order: EngineOrder,
    onnx_path: Path,
    *,
    output_dir: Path,
    proof: Callable[[], Proof],
    log: StageLog,
) -> tuple[EngineEntry, list[CertificateEntry]]:
    """Build one engine and compare it with ``proof``; its entry, and what was measured.

    Built files go below ``output_dir``. A built engine that this machine cannot run is not
    measured; the converted graph it was built from is, but in bf16 where no backend here has that.
    """
    from sd_export.verify import verify_engine

    backend, component, entry, profile = order.backend, order.component, order.entry, order.profile
    precision, calibration = order.precision, order.calibration
    certificate: list[CertificateEntry] = []
    converts = backend not in PORTABLE_BACKENDS and precision not in ("tf32", entry.precision)
    half = precision if converts else None
    # ranges hold for a drawing's inputs, so 8 bits are compared on those, not on random ones
    along_a_picture: Proof | None = None
    with ExitStack() as stack:
        if calibration is not None and precision == "fp8":
            from sd_export.fp8 import calibrated_entry, fp8_graph

            graph, along_a_picture = stack.enter_context(
                fp8_graph(
                    onnx_path,
                    output_dir,
                    component,
                    entry=entry,
                    profile=profile,
                    calibration=calibration,
                    log=log,
                )
            )
        else:
            graph = stack.enter_context(half_graph(onnx_path, output_dir, component, half, log))
        if half is not None:
            try:
                certificate.append(
                    verify_graph(
                        graph,
                        component=component,
                        entry=converted_entry(graph, entry, half),
                        profile=profile,
                        proof=lambda: along_a_picture or proof(),
                        log=log,
                    )
                )
            except BackendError as error:
                if half != "bf16":
                    raise
                log.skipped(component, "verify onnx", detail=f"cannot run here: {error.message}")
        if calibration is not None and precision == "int8":
            from sd_export.int8 import int8_engine

            engine, along_a_picture = int8_engine(
                graph,
                output_dir=output_dir,
                component=component,
                entry=entry,
                profile=profile,
                target=order.target,
                calibration=calibration,
                log=log,
            )
        else:
            with log.stage(component, f"build {backend}") as result:
                engine = build_engine(
                    backend,
                    graph,
                    output_dir=output_dir,
                    component=component,
                    entry=replace(entry, precision=half) if half else entry,
                    profile=profile,
                    precision=precision,
                    target=order.target,
                    workspace_bytes=order.workspace_bytes,
                )
                if calibration is not None and precision == "fp8":
                    engine = calibrated_entry(engine, entry, profile, calibration)
                result.detail = f"{engine.version} {engine.target} {engine.precision}"
                result.bytes = engine.bytes
    beside = onnx_path.with_name(PurePosixPath(engine.file).name)
    engine_path = output_dir / engine.file if engine.is_built else beside
    try:
        with log.stage(component, f"verify {backend}") as result:
            measured = verify_engine(
                engine_path,
                engine,
                component=entry,
                profile=profile,
                proof=along_a_picture or proof(),
            )
            result.detail = words_of(measured)
        certificate.append(measured)
    except (BackendError, EngineMismatchError) as error:
        if backend in PORTABLE_BACKENDS:
            raise
        log.skipped(component, f"verify {backend}", detail=f"cannot run here: {error.message}")
    return engine, certificate
