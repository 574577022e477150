"""One engine, built from a component's ONNX and compared with what it should compute.

TensorRT computes in the graph's own types, so an engine of fewer digits than the graph is built
from a converted copy, which is checked on the CPU and then dropped: fp16 and fp8 in ONNX Runtime,
bf16 in OpenVINO where it and the processor have that. What OpenVINO runs in 8 bits is made by
`sd_export.int8`.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from sd_engines.bundle import PORTABLE_BACKENDS, CertificateEntry, EngineEntry
from sd_engines.engine import build_engine
from sd_engines.spec import LOSSY
from sd_export.graph_proof import verify_graph, words_of
from sd_export.half_graph import converted_entry, half_graph
from sd_export.work import key_of, versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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
    def converted(self) -> Precision | None:
        """What the graph is converted to before it is built; None: it is built as it is."""
        if self.backend in PORTABLE_BACKENDS or self.precision in ("tf32", self.entry.precision):
            return None
        return self.precision

    @property
    def key(self) -> str:
        """SHA-256 over all that decides the engine."""
        calibration = self.calibration if self.precision in LOSSY else None
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

    component, entry, profile = order.component, order.entry, order.profile
    certificate: list[CertificateEntry] = []
    with _graph(order, onnx_path, output_dir=output_dir, proof=proof, log=log) as (graph, proof):
        converted = order.converted
        if converted is not None:
            with log.skipped_if_unable(component, "verify onnx", must=converted != "bf16"):
                measured = verify_graph(
                    graph,
                    component=component,
                    entry=converted_entry(graph, entry, converted),
                    profile=profile,
                    proof=proof,
                    log=log,
                )
                certificate.append(measured)
        engine, proof = _built(order, graph, output_dir=output_dir, proof=proof, log=log)
    beside = onnx_path.with_name(PurePosixPath(engine.file).name)
    path = output_dir / engine.file if engine.is_built else beside
    stage, must = f"verify {order.backend}", order.backend in PORTABLE_BACKENDS
    with (
        log.skipped_if_unable(component, stage, must=must),
        log.stage(component, stage) as result,
    ):
        measured = verify_engine(path, engine, component=entry, profile=profile, proof=proof())
        result.detail = words_of(measured)
        certificate.append(measured)
    return engine, certificate


@contextmanager
def _graph(
    order: EngineOrder,
    onnx_path: Path,
    *,
    output_dir: Path,
    proof: Callable[[], Proof],
    log: StageLog,
) -> Iterator[tuple[Path, Callable[[], Proof]]]:
    """What the engine is built from, while the block runs: the ONNX, or a copy; and its proof."""
    if order.precision == "fp8" and order.calibration is not None:
        from sd_export.fp8 import fp8_graph

        with fp8_graph(
            onnx_path,
            output_dir,
            order.component,
            entry=order.entry,
            profile=order.profile,
            calibration=order.calibration,
            log=log,
        ) as (graph, along_a_picture):
            yield graph, lambda: along_a_picture
    else:
        with half_graph(onnx_path, output_dir, order.component, order.converted, log) as graph:
            yield graph, proof


def _built(
    order: EngineOrder,
    graph: Path,
    *,
    output_dir: Path,
    proof: Callable[[], Proof],
    log: StageLog,
) -> tuple[EngineEntry, Callable[[], Proof]]:
    """The engine of ``graph``, and what it is compared with.

    Ranges hold for a drawing's inputs, so 8 bits are compared on those, not on random ones.
    """
    entry, calibration = order.entry, order.calibration
    if order.precision == "int8" and calibration is not None:
        from sd_export.int8 import int8_engine

        engine, along_a_picture = int8_engine(
            graph,
            output_dir=output_dir,
            component=order.component,
            entry=entry,
            profile=order.profile,
            target=order.target,
            calibration=calibration,
            log=log,
        )
        return engine, lambda: along_a_picture
    with log.stage(order.component, f"build {order.backend}") as result:
        engine = build_engine(
            order.backend,
            graph,
            output_dir=output_dir,
            component=order.component,
            entry=replace(entry, precision=order.converted or entry.precision),
            profile=order.profile,
            precision=order.precision,
            target=order.target,
            workspace_bytes=order.workspace_bytes,
            calibration=calibration.digest if order.precision == "fp8" and calibration else None,
        )
        result.detail = f"{engine.version} {engine.target} {engine.precision}"
        result.bytes = engine.bytes
    return engine, proof
