"""A component's ONNX graph and its reference outputs: made from the checkpoint, or found made.

Both come from the same torch module while it is in memory; afterwards it is gone.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sd_engines.bundle import ComponentEntry, FileEntry, hash_files
from sd_engines.spec import TensorSpec
from sd_export.memory import release

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sd_engines.spec import Precision, Profile
    from sd_export.checkpoint import Checkpoint
    from sd_export.progress import StageLog
    from sd_export.verify import Arrays, Proof
    from sd_export.work import WorkFolder


def recorded_graph(
    work: WorkFolder,
    component: str,
    *,
    file: str,
    checkpoint: Checkpoint,
    profile: Profile,
    precision: Precision,
    feature_cache: bool,
    key: str,
    log: StageLog,
) -> ComponentEntry:
    """The component's ONNX below ``work.bundle``, made now or recorded by an interrupted run.

    ``file`` is its path there: one that is not called `MODEL_FILE` lies beside one that is, and
    shares its weights. ``key`` is over all that the graph depends on.
    """
    stage = f"{file} onnx"
    done = work.finished(stage, key)
    if done is not None:
        entry = _entry(done)
        log.skipped(component, "trace", size=entry.bytes)
        return entry
    data = _make(
        component,
        file=file,
        checkpoint=checkpoint,
        profile=profile,
        precision=precision,
        feature_cache=feature_cache,
        work=work,
        log=log,
    )
    release()
    made = [f"bundle/{name}" for name in data["files"]]
    reference = _reference_path(work, file).relative_to(work.path).as_posix()
    work.finish(stage, key, files=[*made, reference], data=data)
    return _entry(data)


def _write_reference(path: Path, inputs: Arrays, outputs: Arrays) -> None:
    """Write at ``path`` what `stored_proof` reads."""
    import numpy as np
    from safetensors.numpy import save as to_safetensors

    arrays = {f"in.{name}": array for name, array in inputs.items()}
    arrays |= {f"out.{name}": array for name, array in outputs.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(  # written by us: a full disk is then an OSError
        to_safetensors({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    )


def stored_proof(work: WorkFolder, file: str, *, reference_name: str) -> Proof:
    """What the original gave for the inputs of the graph ``file`` when that was made."""
    from safetensors.numpy import load_file

    from sd_export.verify import Proof

    arrays = load_file(_reference_path(work, file))
    return Proof(
        inputs={n.removeprefix("in."): a for n, a in arrays.items() if n.startswith("in.")},
        reference={n.removeprefix("out."): a for n, a in arrays.items() if n.startswith("out.")},
        reference_name=reference_name,
    )


def _make(
    component: str,
    *,
    file: str,
    checkpoint: Checkpoint,
    profile: Profile,
    precision: Precision,
    feature_cache: bool,
    work: WorkFolder,
    log: StageLog,
) -> dict[str, Any]:
    """Load, run for reference, trace, convert and save; returns the fields of its entry."""
    from sd_export import verify, wrappers
    from sd_export.borders import borders
    from sd_export.layer_table import write_layer_table
    from sd_export.load import load_model
    from sd_export.onnx_export import MODEL_FILE, OPSET, save, save_beside, trace
    from sd_export.onnx_passes import to_half
    from sd_export.onnxruntime_graph import write_onnxruntime_graph

    with log.stage(component, "load") as result:
        model = load_model(checkpoint, wrappers.model_of(component))
        result.bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        module = wrappers.wrap(
            component, model, checkpoint=checkpoint, profile=profile, feature_cache=feature_cache
        )
    inputs, outputs = borders(
        component, checkpoint=checkpoint, profile=profile, feature_cache=feature_cache
    )
    with log.stage(component, "reference"):
        config = checkpoint.configs.get(component, {})  # of a text encoder, for its input_ids
        vocab_size = int(config.get("vocab_size", 0))
        probe = verify.probe_inputs(component, inputs, profile=profile, vocab_size=vocab_size)
        reference = verify.reference_outputs(
            module, component, probe, outputs, checkpoint=checkpoint, model=model
        )
        _write_reference(_reference_path(work, file), probe, reference)
    with log.stage(component, "trace"):
        graph = trace(module, component=component, inputs=inputs, outputs=outputs)
    values = list(graph.graph.initializers.values())
    if precision in ("fp16", "bf16"):
        with log.stage(component, f"convert to {precision}"):
            to_half(graph, precision)
    with log.stage(component, "save") as result:
        path = work.bundle / file
        saved = save(graph, path.parent) if path.name == MODEL_FILE else save_beside(graph, path)
        saved += write_onnxruntime_graph(path)
        saved.append(write_layer_table(path, module=module, model=model))
        result.bytes = sum(path.stat().st_size for path in saved)
    # onnxscript's rewriter remembers its last match, through it the whole graph, and onnx_ir every
    # value that was ever an initializer: what they remember must not hold the weights
    for value in (*values, *graph.graph.initializers.values()):
        value.const_value = None
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.new_empty(0)
    names = [path.relative_to(work.bundle).as_posix() for path in sorted(saved)]
    return {
        "file": file,
        "files": {name: asdict(entry) for name, entry in hash_files(work.bundle, names).items()},
        "precision": precision,
        "opset": OPSET,
        "inputs": [asdict(spec) for spec in inputs],
        "outputs": [asdict(spec) for spec in outputs],
    }


def _reference_path(work: WorkFolder, file: str) -> Path:
    return (work.path / "reference" / file).with_suffix(".safetensors")


def _entry(data: Mapping[str, Any]) -> ComponentEntry:
    """The manifest's entry from its record."""

    def specs(key: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in data[key])

    return ComponentEntry(
        file=data["file"],
        files={name: FileEntry(**entry) for name, entry in data["files"].items()},
        precision=data["precision"],
        opset=data["opset"],
        inputs=specs("inputs"),
        outputs=specs("outputs"),
    )
