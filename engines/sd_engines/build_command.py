"""The commands that make engines of a bundle, for hints: an engine anew, or one that it lacks."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

from sd_engines.spec import LOSSY, caches_features, draws_from_text, is_halved

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines.entries import ComponentEntry, EngineEntry
    from sd_engines.spec import Precision

_USUAL_TARGETS = ("any", "cpu")


def build_command(path: Path, engine: EngineEntry) -> str:
    """What makes ``engine`` anew in the bundle at ``path``: as it was made, not as is usual.

    Of a UNet that tells its precision. What else a bundle holds is in the precision that goes with
    the UNet's, and is made by the same command.
    """
    options = [f"--backend {engine.backend}"]
    if is_halved(engine.component) and engine.precision != "fp16":
        options.append(f"--precision {engine.precision}")
    if engine.breadth and engine.target not in _USUAL_TARGETS:  # 0: a model of GPU, this one's
        options.append(f"--target {engine.target}")
    workspace = engine.flags.get("workspace_bytes", "all")
    if workspace.isdecimal() and int(workspace) >> 20:
        options.append(f"--workspace-mib {int(workspace) >> 20}")
    return f"sd-export build {quote(str(path))} {' '.join(options)}"


def missing_engine_hint(
    path: Path, entry: ComponentEntry, *, backend: str, precision: Precision | None
) -> str:
    """What to do where the bundle at ``path`` lacks an engine of the component that is ``entry``.

    ``backend`` is one of `BACKENDS` or ``auto``, ``precision`` what was asked for.
    """
    build, graph = f"sd-export build {quote(str(path))}", entry.precision
    compiles = backend.startswith("tensorrt")
    if precision is None:
        return f"{build} --backend {'onnxruntime' if backend == 'auto' else backend}"
    if precision in LOSSY:
        return _quantized_hint(build, entry, backend if compiles else "tensorrt", precision)
    if precision == "fp16" and graph == "fp16" and not compiles:
        return f"{build} --backend onnxruntime"
    if (precision == "fp16" and not compiles) or (compiles and graph not in ("fp32", precision)):
        return f"Export the checkpoint again with --precision {precision}."
    if precision == "tf32" and not compiles:
        return f"{build} --backend onnxruntime --target cuda"
    if not compiles:
        is_graphs = precision == graph and backend in ("auto", "onnxruntime")
        backend = "onnxruntime" if is_graphs else "openvino"
    return f"{build} --backend {backend} --precision {precision}"


def _quantized_hint(build: str, entry: ComponentEntry, compiles: str, precision: Precision) -> str:
    if not draws_from_text(entry.inputs):
        return f"Take another --precision: {precision} is for UNets that draw from text alone."
    if caches_features(entry.outputs):
        return "Take another --precision, or export the checkpoint again without --feature-cache."
    options = f"--backend {'openvino' if precision == 'int8' else compiles} --precision {precision}"
    if entry.precision not in (("fp32",) if precision == "int8" else ("fp32", "fp16")):
        return f"Export the checkpoint again with {options}."
    return f"{build} {options}"
