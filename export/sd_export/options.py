"""What commands of ``sd-export`` have in common on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable

FILE = click.Path(path_type=Path)
_BACKENDS = "onnxruntime, openvino, tensorrt, tensorrt-rtx"


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of every command that makes engines."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="No progress and no words, only errors."),
        click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON."),
        click.option(
            "--calibration-prompts",
            type=FILE,
            help="For int8 and fp8: what to draw to find its ranges, one prompt a line.",
        ),
        click.option(
            "--precision",
            help="fp32, fp16, bf16, tf32 for a GPU, fp8 for TensorRT, or int8 for openvino. "
            "[default: what suits the backends]",
        ),
        click.option(
            "--backend",
            "backends",
            multiple=True,
            metavar="NAME",
            help=f"{_BACKENDS}; repeatable. [default: what suits this machine; build has none]",
        ),
    ):
        command = option(command)
    return command


def prompts_of(path: Path | None) -> list[str] | None:
    """The lines of ``path``; `ConfigError` where it cannot be read or holds none."""
    from sd_runtime.prompts import prompts_from_text

    return None if path is None else prompts_from_text(path)
