"""A bundle whose UNet rounds as TensorRT's fp8 does, for a processor: to score it without a GPU.

``python benchmarks/emulate_fp8.py BUNDLE OUTPUT [--calibration-prompts FILE]``

The graph is the one that ``sd-export build --precision fp8`` compiles, but for what is between its
rounded layers, which is in fp32. ONNX Runtime computes it, slower than the exact one, so what it
tells is quality and no time: ``sd-bench quality OUTPUT --backend onnxruntime``.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from sd_engines.bundle import Bundle, hash_files, open_bundle
from sd_engines.engine import build_engine
from sd_engines.seal import seal
from sd_export.calibration import calibration_for
from sd_export.fp8 import fp8_graph
from sd_export.options import prompts_of
from sd_export.progress import StageLog
from sd_export.terminal import shown_progress


def emulate(bundle: Bundle, output: Path, prompts: list[str] | None) -> None:
    """Write ``bundle`` as a new one at ``output``, with its UNet's graph in fp8."""
    manifest = bundle.manifest
    calibration = calibration_for("fp8", bundle.path, manifest, prompts)
    assert calibration is not None  # noqa: S101 - fp8 has one
    entry = manifest.components["unet"]
    with TemporaryDirectory(dir=output.parent) as work:
        staging = shutil.copytree(bundle.path, Path(work) / "bundle")
        with fp8_graph(
            bundle.path / entry.file,
            staging,
            "unet",
            entry=entry,
            profile=manifest.profile,
            calibration=calibration,
            log=StageLog(shown_progress(False)),
            halved=False,
        ) as (graph, _):
            shutil.rmtree(staging / "unet")
            shutil.copytree(graph.parent, staging / "unet")
        names = [f"unet/{path.name}" for path in sorted((staging / "unet").iterdir())]
        unet = replace(entry, files=hash_files(staging, names))
        components = {**manifest.components, "unet": unet}
        engines = tuple(
            build_engine(
                "onnxruntime",
                staging / component.file,
                output_dir=staging,
                component=name,
                entry=component,
                profile=manifest.profile,
            )
            for name, component in components.items()
        )
        shutil.rmtree(staging / "engines", ignore_errors=True)
        seal(staging, output, replace(manifest, components=components, engines=engines))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--calibration-prompts", type=Path)
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    emulate(bundle, arguments.output.absolute(), prompts_of(arguments.calibration_prompts))


if __name__ == "__main__":
    main()
