"""Finds a checkpoint and says what it is, before anything of it is loaded.

A checkpoint is a folder in the diffusers layout (local, or fetched from the Hub) or one file in
the original CompVis layout. Either way the result is a `Checkpoint`: plain configs and the paths
of weight files.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

WEIGHT_STEMS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "safety_checker": "model",
}
"""Models of a checkpoint folder, and the stem of their safetensors file."""
SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")
_REQUIRED = ("text_encoder", "unet", "vae", "scheduler", "tokenizer")
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_LICENSE_FILE = re.compile(r"(licen[cs]e|copying)([-_.].*)?", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_LAYOUT_HINT = (
    "Name a Hub id, a folder in the diffusers layout (with model_index.json), or a .safetensors "
    "or .ckpt file in the original layout."
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a checkpoint's parts lie, and their configs in diffusers' words.

    ``configs`` has ``text_encoder``, ``unet``, ``vae``, ``scheduler``, and ``safety_checker`` with
    ``feature_extractor`` where the checkpoint has them. ``weights`` maps a model to its files.
    ``single_file`` means the original layout: all models share one file, and the tokenizer is
    CLIP's own.
    """

    source: str
    revision: str | None
    configs: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, tuple[Path, ...]]
    tokenizer: Path | None
    licenses: tuple[Path, ...] = ()
    license: str | None = None
    single_file: bool = False
    commit: str | None = field(default=None)

    @property
    def has_safety_checker(self) -> bool:
        """Whether pictures are to be checked as the checkpoint's pipeline does."""
        return "safety_checker" in self.weights

    @property
    def family(self) -> str:
        """The family's name in the manifest."""
        wide = self.configs["unet"]["cross_attention_dim"] == 1024
        return "stable-diffusion-v2" if wide else "stable-diffusion-v1"


def find_checkpoint(
    model: str, *, revision: str | None = None, variant: str | None = None
) -> Checkpoint:
    """The checkpoint that ``model`` names: a path that exists, else an id on the Hub.

    ``revision`` is a branch, tag or commit on the Hub, ``variant`` the ``fp16`` of
    ``model.fp16.safetensors``. Raises `ConfigError` for a name that is neither and `ExportError`
    for a checkpoint that cannot be had or is not one.
    """
    path = Path(model).expanduser()
    if path.exists():
        if revision is not None:
            raise ConfigError(
                f"--revision {revision} is for checkpoints on the Hub; {model} is on this disk",
                "Leave --revision out.",
            )
        return _local(model, path, variant)
    if model.startswith((".", "/", "~")) or model.endswith(SINGLE_FILE_SUFFIXES):
        raise ConfigError(f"no such file or folder: {model}", _LAYOUT_HINT)
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"{model!r} is neither a path on this disk nor an id on the Hub", _LAYOUT_HINT
        )
    from sd_export.hub import fetch

    folder, commit = fetch(model, revision=revision, variant=variant)
    return read_folder(folder, source=model, revision=commit, variant=variant)


def _local(model: str, path: Path, variant: str | None) -> Checkpoint:
    if path.is_dir():
        return read_folder(path, source=model, revision=None, variant=variant)
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
        configs = single_file_configs(weights)
    _check_family(configs)
    return Checkpoint(
        source=model,
        revision=None,
        configs=configs,
        weights=dict.fromkeys(("text_encoder", "unet", "vae"), (path,)),
        tokenizer=None,
        license="creativeml-openrail-m",
        single_file=True,
    )


def read_folder(
    folder: Path, *, source: str, revision: str | None, variant: str | None
) -> Checkpoint:
    """Read a checkpoint in the diffusers layout; `ExportError` names the part that is wrong."""
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise ExportError(
            f"{source} is no checkpoint: it has no model_index.json",
            _LAYOUT_HINT,
            component="checkpoint",
            stage="load",
        )
    index = read_json(index_path, component="checkpoint")
    _check_pipeline(source, str(index.get("_class_name")))
    for part in _REQUIRED:
        if not (folder / part).is_dir():
            raise _missing(part, f"{source} has no folder {part}")
    parts = ["text_encoder", "unet", "vae"]
    wants_checker = (index.get("safety_checker") or [None, None])[1] is not None
    if wants_checker:
        for part in ("safety_checker", "feature_extractor"):
            if not (folder / part).is_dir():
                raise _missing(part, f"model_index.json names a {part}, {source} has none")
        parts.append("safety_checker")
    configs = {part: read_json(folder / part / "config.json", component=part) for part in parts}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    configs["scheduler"] = read_json(scheduler, component="scheduler")
    if wants_checker:
        processor = folder / "feature_extractor" / "preprocessor_config.json"
        configs["feature_extractor"] = read_json(processor, component="feature_extractor")
    _check_family(configs)
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file() and not (
        (tokenizer / "vocab.json").is_file() and (tokenizer / "merges.txt").is_file()
    ):
        raise _missing("tokenizer", "neither tokenizer.json nor vocab.json with merges.txt")
    return Checkpoint(
        source=source,
        revision=revision,
        configs=configs,
        weights={part: weight_files(folder / part, part, variant) for part in parts},
        tokenizer=tokenizer,
        licenses=tuple(sorted(p for p in folder.iterdir() if _LICENSE_FILE.fullmatch(p.name))),
        license=_card_license(folder / "README.md"),
    )


def weight_files(folder: Path, component: str, variant: str | None) -> tuple[Path, ...]:
    """The weight files of one model: safetensors before pickles, all shards of a sharded one."""
    stem = WEIGHT_STEMS[component]
    middle = f".{variant}" if variant else ""
    pickle_stem = "pytorch_model" if stem == "model" else stem
    for name in (f"{stem}{middle}.safetensors", f"{pickle_stem}{middle}.bin"):
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}.index{middle}.json"
        if not index.is_file():
            index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index, component=component).get("weight_map", {})
            paths = tuple(folder / shard for shard in sorted(set(shards.values())))
            for path in paths:
                if path.parent != folder or not path.is_file():
                    raise _missing(component, f"shard {path.name} is missing")
            return paths
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


def read_json(path: Path, *, component: str) -> dict[str, Any]:
    """A JSON object from ``path``; `ExportError` where it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _missing(component, f"{path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise ExportError(
            f"cannot read {path.name}: {error}",
            "Download the checkpoint again.",
            component=component,
            stage="load",
        ) from error
    if not isinstance(value, dict):
        raise _missing(component, f"{path.name} holds no object")
    return value


def _missing(component: str, message: str) -> ExportError:
    return ExportError(message, "Download the whole checkpoint.", component=component, stage="load")


def _check_pipeline(source: str, name: str) -> None:
    if name not in _PIPELINES:
        raise ExportError(
            f"{source} is for {name}, which is not supported",
            "sd-export takes Stable Diffusion v1 text-to-image checkpoints "
            f"({', '.join(_PIPELINES)}).",
            component="checkpoint",
            stage="load",
        )


def _check_family(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse by name what has the layout of v1 but is another model inside."""
    unet, vae = configs["unet"], configs["vae"]
    channels = vae.get("latent_channels", 4)
    problem = None
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        problem = f"the denoiser is a {unet['_class_name']}"
    elif vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        problem = f"the VAE is a {vae['_class_name']}"
    elif unet.get("addition_embed_type") or unet.get("class_embed_type"):
        problem = "its UNet takes further conditioning (Stable Diffusion XL or an upscaler)"
    elif unet.get("in_channels", 4) != channels:
        problem = (
            f"its UNet takes {unet.get('in_channels')} channels for {channels} of latents "
            "(inpainting or an upscaler)"
        )
    elif not isinstance(unet.get("cross_attention_dim"), int):
        problem = "its UNet has several widths of cross attention"
    elif unet["cross_attention_dim"] != configs["text_encoder"].get("hidden_size"):
        problem = (
            f"its UNet takes prompts of width {unet['cross_attention_dim']}, its text encoder "
            f"makes {configs['text_encoder'].get('hidden_size')}"
        )
    elif vae.get("shift_factor") or vae.get("latents_mean"):
        problem = "its VAE shifts its latents"
    if problem is not None:
        raise ExportError(
            f"not a Stable Diffusion v1 text-to-image model: {problem}",
            "sd-export takes Stable Diffusion v1 checkpoints and others of the same shape.",
            component="checkpoint",
            stage="load",
        )


def _card_license(card: Path) -> str | None:
    """``license:`` of the model card's front matter, or None."""
    if not card.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text("utf-8", "replace"), re.DOTALL)
    line = re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", front[1], re.MULTILINE) if front else None
    return line[1] if line else None
