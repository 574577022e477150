"""How long a new process takes to its first picture: `sd-run`, started again and again.

Only the process is cold. The bundle's files are in the system's cache, as on a machine that has
run before; nothing is dropped from it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from sd_engines.errors import BackendError
from sd_runtime.timing import clock

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sd_bench.measurement import Settings

_SD_RUN: Final = "import sys; from sd_runtime.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class ColdStart:
    """One process: ms from its start to the first picture on disk, and what they went into.

    ``stages_ms``: "process" until sd-run's first own line, "load" until all engines are open,
    "generate" the first request, whatever compiles then included, "png", and "other".
    """

    first_picture_ms: float
    stages_ms: Mapping[str, float]


def measure_cold_start(bundle: Path, settings: Settings) -> ColdStart:
    """Start `sd-run` once on ``settings``. `BackendError` where it fails, with its own words."""
    with TemporaryDirectory() as folder:
        command = sd_run_command(bundle, settings, output=Path(folder) / "{index}.png")
        began = clock()
        ended = subprocess.run(  # noqa: S603 - this interpreter and this package
            command, capture_output=True, text=True, check=False
        )
    if ended.returncode:
        raise BackendError(
            f"sd-run ended with {ended.returncode}: {ended.stderr.strip()[-2000:]}",
            "Run it yourself to see more: sd-run BUNDLE PROMPT --output FILE.png",
        )
    return _cold_start(began, json.loads(ended.stdout))


def sd_run_command(bundle: Path, settings: Settings, *, output: Path) -> list[str]:
    """The command that draws ``settings`` in a process of its own, as one does who runs it."""
    options: dict[str, Any] = {
        "--output": output,
        "--negative-prompt": settings.negative_prompt,
        "--seed": settings.seed,
        "--num-images": settings.num_images,
        "--height": settings.height,
        "--width": settings.width,
        "--num-inference-steps": settings.num_inference_steps,
        "--guidance-scale": settings.guidance_scale,
        "--guidance-start": settings.guidance_start,
        "--guidance-stop": settings.guidance_stop,
        "--cache-interval": settings.cache_interval,
        "--scheduler": settings.scheduler,
        "--backend": None if settings.backend == "auto" else settings.backend,
        "--precision": settings.precision,
        "--threads": settings.threads,
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    # -P as for the installed command: the working directory is no place to import from.
    python = [sys.executable, "-P", "-c", _SD_RUN]
    return [*python, *given, "--json", "--quiet", "--", str(bundle), settings.prompt]


def _cold_start(began_s: float, report: Mapping[str, Any]) -> ColdStart:
    """From `sd-run`'s own report; its clock and ours are the machine's."""
    timings = report["timings_ms"]
    stages = {"process": 1e3 * (report["started_s"] - began_s)}
    stages |= {stage: timings[stage] for stage in ("load", "generate", "png")}
    total_ms = stages["process"] + timings["first_picture"]
    return ColdStart(total_ms, {**stages, "other": total_ms - sum(stages.values())})
