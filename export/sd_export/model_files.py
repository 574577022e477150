"""The files of one model in a checkpoint's folder: its config, and its weights by any name."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ExportError

if TYPE_CHECKING:
    from pathlib import Path

WEIGHT_STEMS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "safety_checker": "model",
    "depth_estimator": "model",
    "image_encoder": "model",
}
"""Models of a checkpoint folder, and the stem of their safetensors file."""
CONTROLNET_STEM = "diffusion_pytorch_model"


def weight_kinds(stem: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """How names of weight files start and end: safetensors of the ``stem``, before pickles."""
    return (stem, "safetensors"), ("pytorch_model" if stem == "model" else stem, "bin")


def weight_files(folder: Path, component: str, variant: str | None) -> tuple[Path, ...]:
    """The weight files of one model: safetensors before pickles, all shards of a sharded one."""
    middle = f".{variant}" if variant else ""
    for start, suffix in weight_kinds(WEIGHT_STEMS.get(component, CONTROLNET_STEM)):
        whole = folder / f"{start}{middle}.{suffix}"
        if whole.is_file():
            return (whole,)
        index = folder / f"{start}.{suffix}.index{middle}.json"
        if index.is_file():
            return _shards(index, component=component)
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    others = f"; found {', '.join(found)}" if found else ""
    asked = f" for variant {variant!r}" if variant else ""
    variants = sorted({m[1] for n in found if (m := re.search(r"\.(\w+)\.(safetensors|bin)$", n))})
    hint = (
        f"Try --variant {variants[0]}."
        if variants and variant is None
        else "Leave --variant out."
        if variant
        else "Download the checkpoint again."
    )
    raise ExportError(
        f"no weights{asked} in {folder.name}/{others}", hint, component=component, stage="load"
    )


def _shards(index: Path, *, component: str) -> tuple[Path, ...]:
    """The files beside ``index`` that it names; `ExportError` for one that is not there."""
    shards = read_json(index, component=component).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) and _are_texts(shards) else set()
    if not names:
        raise missing_part(component, f"the weight_map of {index.name} names no shards")
    present = {path.name for path in index.parent.iterdir() if path.is_file()}
    if missing := sorted(names - present):
        raise missing_part(component, f"shard {missing[0][:100]} is missing")
    return tuple(index.with_name(name) for name in sorted(names))


def _are_texts(values: dict[str, Any]) -> bool:
    return all(isinstance(value, str) for value in values.values())


def read_json(path: Path, *, component: str) -> dict[str, Any]:
    """A JSON object from ``path``; `ExportError` where it is missing or broken.

    An infinity may be in it, as in diffusers' configs of schedulers.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except FileNotFoundError as error:
        raise missing_part(component, f"{path.name} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(
            f"cannot read {path.name}: {error}",
            "Download the checkpoint again.",
            component=component,
            stage="load",
        ) from error
    if not isinstance(value, dict):
        raise missing_part(component, f"{path.name} holds no object")
    return value


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)


def missing_part(component: str, message: str) -> ExportError:
    """What to raise where a checkpoint lacks ``component``, or something of it."""
    return ExportError(message, "Download the whole checkpoint.", component=component, stage="load")
