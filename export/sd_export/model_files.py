"""The files of one model in a checkpoint's folder: its config, and its weights by any name."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ExportError
from sd_runtime.option_values import shown

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
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
_STEM = "diffusion_pytorch_model"
"""Of a ControlNet."""
_VARIANT = re.compile(r"\.(\w+)(-\d+-of-\d+)?\.(safetensors|bin)$")


def weight_files(
    folder: Path, component: str, variant: str | None, *, files: Iterable[Path] | None = None
) -> tuple[Path, ...]:
    """The weight files of one model: safetensors before pickles, all shards of a sharded one.

    ``files`` are what ``folder`` will hold, other folders' among them; None means what it holds.
    """
    stem = WEIGHT_STEMS.get(component, _STEM)
    middle = f".{variant}" if variant else ""
    pickle_stem = "pytorch_model" if stem == "model" else stem
    if files is None:
        files = (path for path in folder.iterdir() if path.is_file())
    present = {path.name for path in files if path.parent == folder}
    for start, suffix in ((stem, "safetensors"), (pickle_stem, "bin")):
        whole = f"{start}{middle}.{suffix}"
        if whole in present:
            return (folder / whole,)
        for index in (  # the second as diffusers named it before 0.31
            f"{start}.{suffix}.index{middle}.json",
            f"{start}.{suffix}{middle}.index.json",
        ):
            if index in present:
                return _shards(folder / index, present, component=component)
    found = sorted(name for name in present if name.endswith((".safetensors", ".bin")))
    others = f"; found {', '.join(found)}" if found else ""
    asked = f" for variant {variant!r}" if variant else ""
    variants = sorted({m[1] for name in found if (m := _VARIANT.search(name))})
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


def _shards(index: Path, present: Collection[str], *, component: str) -> tuple[Path, ...]:
    """The files beside ``index`` that it names; `ExportError` for one that is not ``present``."""
    shards = read_json(index, component=component).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) and _are_texts(shards) else set()
    if not names:
        raise missing_part(component, f"the weight_map of {index.name} names no shards")
    if missing := sorted(names.difference(present)):
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


def read_scheduler(folder: Path, *, component: str) -> dict[str, Any]:
    """The config of a scheduler in ``folder``, as `read_json`, to be written as JSON again.

    diffusers writes a lambda_min_clipped of -Infinity, which JSON has not, and takes it where a
    config is silent. `ExportError` for any other field that cannot be written.
    """
    config = read_json(folder / "scheduler_config.json", component=component)
    if config.get("lambda_min_clipped") == float("-inf"):
        del config["lambda_min_clipped"]
    for name, value in config.items():
        try:
            json.dumps({name: value}, allow_nan=False, ensure_ascii=False, indent=2).encode()
        except ValueError as error:
            raise ExportError(
                f"in its scheduler_config.json {name!r} is {shown(value)}, which no JSON holds",
                "Download the checkpoint again.",
                component=component,
                stage="load",
            ) from error
    return config


def missing_part(component: str, message: str) -> ExportError:
    """What to raise where a checkpoint lacks ``component``, or something of it."""
    return ExportError(message, "Download the whole checkpoint.", component=component, stage="load")
