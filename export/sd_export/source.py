"""Finds a checkpoint and says what it is, before anything of it is loaded.

It is a folder in the diffusers layout (local, or fetched from the Hub) or one file in the original
CompVis layout. Either way the result is a `Checkpoint`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ConfigError, ExportError, nearest
from sd_engines.files import is_utf8
from sd_engines.spec import Defaults
from sd_export.checkpoint import TOKENIZER_FOLDERS, Checkpoint
from sd_export.config_fields import OF_DEPTH, checked_config
from sd_export.family import (
    LATENT_CONSISTENCY,
    XL,
    check_configs,
    family_of,
    is_refiner,
    is_upscaler,
    is_xl,
    lone_model,
    pipeline_defaults,
    text_encoders,
)
from sd_export.hub import find_snapshot
from sd_export.license import card_license
from sd_export.model_files import missing_part, read_json, read_scheduler, weight_files
from sd_export.upscaler import LOW_RES_SCHEDULER, max_noise_level, upscaler_configs
from sd_runtime.task import DEPTH_ESTIMATOR, IMAGE_ENCODER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sd_export.hub import Snapshot

_SEERS = ("safety_checker", DEPTH_ESTIMATOR, IMAGE_ENCODER)
"""Models of pictures, which the checkpoint's feature_extractor prepares for them."""
SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_LICENSE_FILE = re.compile(r"(licen[cs]e|copying)([-_.].*)?", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_LAYOUT_HINT = (
    "Name a Hub id, a folder in the diffusers layout (with model_index.json), or a .safetensors "
    "or .ckpt file in the original layout."
)


def find_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
) -> Checkpoint:
    """The checkpoint that ``model`` names: a path that exists, else an id on the Hub.

    ``revision`` is a branch, tag or commit on the Hub, ``variant`` the ``fp16`` of
    ``model.fp16.safetensors``, ``prediction_type`` one of `PREDICTION_TYPES` for a single file,
    which cannot tell it. Raises `ConfigError` for a name that is neither and `ExportError` for a
    checkpoint that cannot be had or is not one.
    """
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise ConfigError(
            f"unknown --prediction-type {prediction_type!r}",
            nearest(prediction_type, PREDICTION_TYPES),
        )
    path = local_path(model, hint=_LAYOUT_HINT)
    if path is not None:
        if revision is not None:
            raise ConfigError(
                f"--revision {revision} is for checkpoints on the Hub; {model} is on this disk",
                "Leave --revision out.",
            )
        if path.is_file():
            return _single_file(model, path, variant=variant, prediction_type=prediction_type)
    if prediction_type is not None:
        raise ConfigError(
            f"--prediction-type {prediction_type} is for single files, which cannot tell it",
            "Leave it out: the folder's scheduler/scheduler_config.json says what holds.",
        )
    found = find_snapshot(model, path, revision=revision)
    checkpoint = read_folder(found, variant=variant)
    found.fetch(path for paths in checkpoint.weights.values() for path in paths)
    return checkpoint


def local_path(
    model: str, *, hint: str, suffixes: tuple[str, ...] = SINGLE_FILE_SUFFIXES
) -> Path | None:
    """What ``model`` names on this disk, None for an id on the Hub; `ConfigError` for neither.

    A name that ends in one of ``suffixes`` is no id.
    """
    if not is_utf8(model):
        raise ConfigError(
            f"the name {model} is not UTF-8, and a bundle names what it is made of",
            "Rename it, or name it from its own folder.",
        )
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model.startswith((".", "/", "~")) or model.endswith(suffixes):
        raise ConfigError(f"no such file or folder: {model}", hint)
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(f"{model!r} is neither a path on this disk nor an id on the Hub", hint)
    return None


def _single_file(
    model: str, path: Path, *, variant: str | None, prediction_type: str | None
) -> Checkpoint:
    if path.suffix not in SINGLE_FILE_SUFFIXES:
        raise ConfigError(f"{model}: not a checkpoint file", _LAYOUT_HINT)
    if variant is not None:
        raise ConfigError(
            f"--variant {variant} picks among the files of a folder; {model} is one file",
            "Leave --variant out.",
        )
    from sd_export.single_file import single_file_configs
    from sd_export.weights import Weights

    with Weights((path,), component="checkpoint") as weights:
        configs, assumed = single_file_configs(weights, prediction_type=prediction_type)
    check_configs(configs)
    family = family_of(configs)
    distilled = configs["unet"].get("time_cond_proj_dim") is not None
    defaults = LATENT_CONSISTENCY if distilled else Defaults()
    return Checkpoint(
        source=model,
        revision=None,
        configs=configs,
        weights=dict.fromkeys((*text_encoders(configs), "unet", "vae"), (path,)),
        tokenizers={},
        license="creativeml-openrail-m" if family == "stable-diffusion-v1" else "openrail++",
        single_file=True,
        assumed=assumed,
        defaults=XL if is_xl(configs) else defaults,
        force_zeros_for_empty_prompt=is_xl(configs) and not is_refiner(configs),
    )


def read_folder(found: Snapshot, *, variant: str | None) -> Checkpoint:
    """Read a checkpoint in the diffusers layout; `ExportError` names the part that is wrong.

    Its weights are still to be fetched.
    """
    folder, source = found.folder, found.model
    index, defaults = read_index(folder, source=source)
    second = _is_named(index, "text_encoder_2")
    variation = _is_named(index, "image_encoder") and not _is_named(index, "text_encoder")
    only_other = second or variation
    encoders = ["text_encoder"] if _is_named(index, "text_encoder") or not only_other else []
    encoders += ["text_encoder_2"] if second else []
    parts = [*encoders, "unet", "vae"]
    for part in (*parts, "scheduler", *(TOKENIZER_FOLDERS[name] for name in encoders)):
        if not (folder / part).is_dir():
            raise missing_part(part, f"{source} has no folder {part}")
    seers = [part for part in _SEERS if _is_named(index, part)]
    if not variation and IMAGE_ENCODER in seers:
        seers.remove(IMAGE_ENCODER)  # an IP-Adapter's, which pipelines may be saved with
    for part in (*seers, "feature_extractor") if seers else ():
        if not (folder / part).is_dir():
            raise missing_part(part, f"model_index.json names a {part}, {source} has none")
    parts += seers
    configs = {
        part: checked_config(part, read_json(folder / part / "config.json", component=part))
        for part in parts
    }
    configs["scheduler"] = read_scheduler(folder / "scheduler", component="scheduler")
    if seers:
        processor = folder / "feature_extractor" / "preprocessor_config.json"
        stated = read_json(processor, component="feature_extractor")
        stated = {name: value for name, value in stated.items() if value is not None}
        configs["feature_extractor"] = checked_config(
            "feature_extractor", stated, stricter=OF_DEPTH if DEPTH_ESTIMATOR in seers else None
        )
    check_configs(configs, pipeline=str(index.get("_class_name")))
    if is_upscaler(configs):
        low_res = folder / LOW_RES_SCHEDULER
        configs[LOW_RES_SCHEDULER] = read_scheduler(low_res, component=LOW_RES_SCHEDULER)
    configs = upscaler_configs(configs)
    tokenizers = _tokenizers(folder, encoders)
    readme = folder / "README.md"
    card = readme if readme.is_file() else None
    return Checkpoint(
        source=source,
        revision=found.commit,
        configs=configs,
        weights={
            part: weight_files(folder / part, part, variant, files=found.files) for part in parts
        },
        tokenizers=tokenizers,
        licenses=tuple(
            sorted(p for p in folder.iterdir() if _LICENSE_FILE.fullmatch(p.name) and p.is_file())
        ),
        card=card,
        license=None if card is None else card_license(card),
        defaults=defaults,
        force_zeros_for_empty_prompt=variation
        or (is_xl(configs) and bool(index.get("force_zeros_for_empty_prompt", True))),
        max_noise_level=max_noise_level(configs, index),
    )


def _tokenizers(folder: Path, encoders: Sequence[str]) -> dict[str, Path]:
    """Where the tokenizer of each of ``encoders`` lies; `ExportError` for one that is not whole."""
    tokenizers = {name: folder / TOKENIZER_FOLDERS[name] for name in encoders}
    for tokenizer in tokenizers.values():
        if not (tokenizer / "tokenizer.json").is_file() and not (
            (tokenizer / "vocab.json").is_file() and (tokenizer / "merges.txt").is_file()
        ):
            raise missing_part(
                tokenizer.name, "neither tokenizer.json nor vocab.json with merges.txt"
            )
    return tokenizers


def _is_named(index: Mapping[str, Any], part: str) -> bool:
    """Whether model_index.json names a class for ``part``; `ExportError` where it names neither."""
    named = index.get(part) or [None, None]
    if not isinstance(named, list) or len(named) != 2:
        raise missing_part(part, "model_index.json does not name its library and class")
    return named[1] is not None


def read_index(folder: Path, *, source: str) -> tuple[dict[str, Any], Defaults]:
    """model_index.json and what its pipeline draws with by default.

    `ExportError` where it is missing or of another kind; it is small, and read before the rest.
    """
    path = folder / "model_index.json"
    if path.is_file():
        index = checked_config("checkpoint", read_json(path, component="checkpoint"))
        return index, pipeline_defaults(str(index.get("_class_name")), source=source)
    config = folder / "config.json"
    alone = lone_model(read_json(config, component="checkpoint")) if config.is_file() else None
    what = f"a {alone} by itself" if alone else "no checkpoint"
    raise ExportError(
        f"{source} is {what}: it has no model_index.json",
        _LAYOUT_HINT,
        component="checkpoint",
        stage="load",
    )
