"""A component's graph in half precision, for as long as an engine is built of it."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from sd_engines.bundle import hash_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sd_engines.bundle import ComponentEntry
    from sd_engines.spec import Precision
    from sd_export.progress import StageLog


@contextmanager
def half_graph(
    onnx_path: Path,
    output_dir: Path,
    component: str,
    precision: Precision | None,
    log: StageLog,
) -> Iterator[Path]:
    """``onnx_path``, or a copy converted to ``precision`` that exists while the block runs."""
    if precision not in ("fp16", "bf16"):
        yield onnx_path
        return
    import onnx_ir as ir

    from sd_export.onnx_export import save
    from sd_export.onnx_passes import to_half

    folder = output_dir.parent / "half" / component
    try:
        with log.stage(component, f"convert to {precision}") as result:
            saved = save(to_half(ir.load(onnx_path), precision), folder)
            result.bytes = sum(path.stat().st_size for path in saved)
        yield saved[0]
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)


def converted_entry(graph: Path, entry: ComponentEntry, precision: Precision) -> ComponentEntry:
    """What ``entry`` is of the copy at ``graph``, which is in ``precision``."""
    root = graph.parent.parent
    names = [p.relative_to(root).as_posix() for p in sorted(graph.parent.iterdir())]
    return replace(
        entry,
        file=graph.relative_to(root).as_posix(),
        files=hash_files(root, names),
        precision=precision,
    )
