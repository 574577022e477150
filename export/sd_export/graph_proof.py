"""A graph as a processor computes it: what is proven of it, and what it proves of others."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sd_engines.bundle import CertificateEntry
from sd_engines.engine import build_engine
from sd_engines.errors import BackendError
from sd_export.work import key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sd_engines.bundle import Bundle, ComponentEntry, EngineEntry
    from sd_engines.spec import Profile
    from sd_export.progress import StageLog
    from sd_export.verify import Proof
    from sd_export.work import WorkFolder


def check_prover() -> None:
    """`BackendError` where ONNX Runtime is missing, before minutes of work that it has to prove."""
    if find_spec("onnxruntime") is None:
        raise BackendError(
            "ONNX Runtime is not installed, by which every graph is proven, whatever runs it later",
            'pip install "sd-toolkit[cpu]"',
        )


def verify_graph(
    graph: Path,
    *,
    component: str,
    entry: ComponentEntry,
    profile: Profile,
    proof: Callable[[], Proof],
    log: StageLog,
) -> CertificateEntry:
    """Compare the ONNX at ``graph`` with ``proof`` on the CPU, in what `proving_engine` says."""
    from sd_export.verify import verify_engine

    with log.stage(component, "verify onnx") as result:
        engine = proving_engine(graph, component, entry, profile)
        measured = verify_engine(graph, engine, component=entry, profile=profile, proof=proof())
        result.detail = words_of(measured)
    return measured


def recorded_measure(
    work: WorkFolder,
    graph: Path,
    *,
    component: str,
    entry: ComponentEntry,
    profile: Profile,
    versions: Mapping[str, str],
    proof: Callable[[], Proof],
    log: StageLog,
) -> CertificateEntry:
    """`verify_graph`, or what an interrupted run recorded of it."""
    stage, key = f"{entry.file} proof", key_of({"graph": asdict(entry), "versions": versions})
    done = work.finished(stage, key)
    if done is None:
        measured = verify_graph(
            graph, component=component, entry=entry, profile=profile, proof=proof, log=log
        )
        done = {"certificate": asdict(measured)}
        work.finish(stage, key, files=[], data=done)
    return CertificateEntry(**done["certificate"])


def words_of(entry: CertificateEntry) -> str:
    """A certificate's entry for people."""
    return f"{entry.metric} {entry.figure:.2g} (tolerance {entry.tolerance:g}, {entry.precision})"


def proving_engine(
    graph: Path, component: str, entry: ComponentEntry, profile: Profile
) -> EngineEntry:
    """An engine for the few runs of a proof: of ONNX Runtime, at the least memory.

    ONNX Runtime has no bf16 on a CPU, so of a graph in bf16 it is OpenVINO's; `BackendError` where
    that or this processor has none either.
    """
    from sd_engines.backends.onnxruntime import LEAN

    if entry.precision == "bf16":
        return build_engine(
            "openvino",
            graph,
            output_dir=graph.parent,
            component=component,
            entry=entry,
            profile=profile,
            precision="bf16",
        )
    engine = build_engine(
        "onnxruntime",
        graph,
        output_dir=graph.parent,
        component=component,
        entry=entry,
        profile=profile,
    )
    return replace(engine, flags=LEAN)


def bundle_proof(bundle: Bundle, component: str) -> Proof:
    """The bundle's own ONNX in ONNX Runtime as the reference of another engine."""
    from tokenizers import Tokenizer

    from sd_export.verify import Proof, probe_inputs, run_engine
    from sd_runtime.pipeline import TOKENIZER_OF

    profile, entry = bundle.manifest.profile, bundle.manifest.components[component]
    vocab_size = 0
    if component in TOKENIZER_OF:
        path = bundle.verified_path(TOKENIZER_OF[component])
        vocab_size = Tokenizer.from_file(str(path)).get_vocab_size()
    inputs = probe_inputs(component, entry.inputs, profile=profile, vocab_size=vocab_size)
    onnx_path = bundle.path / entry.file
    engine = proving_engine(onnx_path, component, entry, profile)
    outputs = run_engine(onnx_path, engine, component=entry, profile=profile, inputs=inputs)
    name = f"the bundle's ONNX, {entry.precision}, onnxruntime {engine.version}"
    return Proof(inputs=inputs, reference=outputs, reference_name=name)
