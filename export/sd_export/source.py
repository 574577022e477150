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

from sd_engines.errors import ConfigError, ExportError, nearest
from sd_engines.spec import Defaults
from sd_export.family import (
    LATENT_CONSISTENCY,
    XL,
    check_configs,
    family_of,
    is_latent_upscaler,
    is_refiner,
    is_upscaler,
    is_xl,
    lone_model,
    painted_channels,
    pipeline_defaults,
    text_encoders,
)
from sd_export.license import card_license
from sd_export.upscaler import LOW_RES_SCHEDULER, max_noise_level, upscaler_configs
from sd_runtime.task import DEPTH_ESTIMATOR, IMAGE_ENCODER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sd_export.embedding import Embedding
    from sd_export.vae import Vae
    from sd_runtime.lora import Lora

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
_SEERS = ("safety_checker", DEPTH_ESTIMATOR, IMAGE_ENCODER)
"""Models of pictures, which the checkpoint's feature_extractor prepares for them."""
CONTROLNET_STEM = "diffusion_pytorch_model"
SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")
TOKENIZER_FOLDERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_LICENSE_FILE = re.compile(r"(licen[cs]e|copying)([-_.].*)?", re.IGNORECASE)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_LAYOUT_HINT = (
    "Name a Hub id, a folder in the diffusers layout (with model_index.json), or a .safetensors "
    "or .ckpt file in the original layout."
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a checkpoint's parts lie, and their configs in diffusers' words.

    ``configs`` has ``text_encoder``, ``text_encoder_2``, both, or ``image_encoder`` in their place;
    ``unet``, ``vae``, ``scheduler``; and ``safety_checker`` or ``depth_estimator`` where the
    checkpoint has them, with ``feature_extractor`` where it has any model of pictures; the x4
    upscaler's has ``low_res_scheduler``. ``weights`` maps a model to its files, ``tokenizers`` a
    text encoder to its tokenizer's folder. ``max_noise_level`` is an upscaler's.
    ``single_file`` means the original layout: all models share one file, and the tokenizers are
    CLIP's own. ``assumed`` says what of it nobody stated. ``defaults`` are its pipeline's, and so
    is ``force_zeros_for_empty_prompt``.
    When a model is loaded ``loras`` are fused into it, ``embeddings`` added to tokenizer and text
    encoder. ``vae`` took the place of its own, with its config and weights in theirs. The UNet is
    to read ``max_prompt_chunks`` prompts of the text encoder's length at once. ``controlnets`` maps
    ``controlnet_0``, … to where they are from; each is a model with a config and weights.
    """

    source: str
    revision: str | None
    configs: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, tuple[Path, ...]]
    tokenizers: Mapping[str, Path]
    licenses: tuple[Path, ...] = ()
    license: str | None = None
    single_file: bool = False
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    max_prompt_chunks: int = 1
    vae: Vae | None = None
    controlnets: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = field(default=None)
    assumed: str | None = None
    defaults: Defaults = field(default_factory=Defaults)
    force_zeros_for_empty_prompt: bool = False
    max_noise_level: int | None = None

    def is_in_original_layout(self, component: str) -> bool:
        """Whether the names of the component's weights are to be translated."""
        if component == "vae" and self.vae is not None:
            return self.vae.single_file
        return self.single_file and component in WEIGHT_STEMS

    @property
    def latent_channels(self) -> int:
        """Channels of the latents; a UNet that is fed more of them is for another task."""
        return int(self.configs["vae"].get("latent_channels", 4))

    @property
    def is_for_inpainting(self) -> bool:
        """Whether the UNet takes the mask and the masked picture's latents beside the latents."""
        return int(self.configs["unet"].get("in_channels", 4)) == 2 * self.latent_channels + 1

    @property
    def is_for_depth(self) -> bool:
        """Whether the UNet takes a picture's depth beside the latents."""
        return int(self.configs["unet"].get("in_channels", 4)) == self.latent_channels + 1

    @property
    def depth_channels(self) -> int:
        """Channels in which the VAE paints depth beside the picture: 0 but of an LDM3D."""
        return painted_channels(self.configs) - 3

    @property
    def reads_image(self) -> bool:
        """Whether the UNet reads a picture in the place of a prompt."""
        return not self.text_encoders

    @property
    def is_upscaler(self) -> bool:
        """Whether the UNet takes a small picture beside the latents, which it makes larger."""
        return is_upscaler(self.configs)

    @property
    def is_latent_upscaler(self) -> bool:
        """Whether the UNet takes a small picture's latents, which it makes larger."""
        return is_latent_upscaler(self.configs)

    @property
    def is_refiner(self) -> bool:
        """Whether the UNet is that of Stable Diffusion XL's refiner."""
        return is_refiner(self.configs)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The models that read prompts, in the order in which their embeddings lie."""
        return text_encoders(self.configs)

    def embeddings_of(self, text_encoder: str) -> tuple[Embedding, ...]:
        """Those of ``embeddings`` that are for one text encoder."""
        return tuple(e for e in self.embeddings if e.text_encoder == text_encoder)

    @property
    def max_prompt_tokens(self) -> int:
        """How many tokens a prompt has, the first and the last included; a picture is one."""
        if self.reads_image:
            return 1
        return int(self.configs[self.text_encoders[0]].get("max_position_embeddings", 77))

    @property
    def family(self) -> str:
        """The family's name in the manifest."""
        return family_of(self.configs)

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts, in diffusers' word."""
        return str(self.configs["scheduler"].get("prediction_type", "epsilon"))


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
    if path is not None:
        return read_folder(path, source=model, revision=None, variant=variant)
    from sd_export.hub import fetch

    folder, commit = fetch(model, revision=revision, variant=variant)
    return read_folder(folder, source=model, revision=commit, variant=variant)


def local_path(model: str, *, hint: str) -> Path | None:
    """What ``model`` names on this disk, None for an id on the Hub; `ConfigError` for neither."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model.startswith((".", "/", "~")) or model.endswith(SINGLE_FILE_SUFFIXES):
        raise ConfigError(f"no such file or folder: {model}", hint)
    if not HUB_ID.fullmatch(model):
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


def read_folder(
    folder: Path, *, source: str, revision: str | None, variant: str | None
) -> Checkpoint:
    """Read a checkpoint in the diffusers layout; `ExportError` names the part that is wrong."""
    index, defaults = read_index(folder, source=source)
    second = _is_named(index, "text_encoder_2")
    variation = _is_named(index, "image_encoder") and not _is_named(index, "text_encoder")
    only_other = second or variation
    encoders = ["text_encoder"] if _is_named(index, "text_encoder") or not only_other else []
    encoders += ["text_encoder_2"] if second else []
    parts = [*encoders, "unet", "vae"]
    for part in (*parts, "scheduler", *(TOKENIZER_FOLDERS[name] for name in encoders)):
        if not (folder / part).is_dir():
            raise _missing(part, f"{source} has no folder {part}")
    seers = [part for part in _SEERS if _is_named(index, part)]
    if not variation and IMAGE_ENCODER in seers:
        seers.remove(IMAGE_ENCODER)  # an IP-Adapter's, which pipelines may be saved with
    for part in (*seers, "feature_extractor") if seers else ():
        if not (folder / part).is_dir():
            raise _missing(part, f"model_index.json names a {part}, {source} has none")
    parts += seers
    configs = {part: read_json(folder / part / "config.json", component=part) for part in parts}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    configs["scheduler"] = read_json(scheduler, component="scheduler")
    if seers:
        processor = folder / "feature_extractor" / "preprocessor_config.json"
        configs["feature_extractor"] = read_json(processor, component="feature_extractor")
    check_configs(configs, pipeline=str(index.get("_class_name")))
    if is_upscaler(configs):
        scheduler = folder / LOW_RES_SCHEDULER / "scheduler_config.json"
        configs[LOW_RES_SCHEDULER] = read_json(scheduler, component=LOW_RES_SCHEDULER)
    configs = upscaler_configs(configs)
    tokenizers = {name: folder / TOKENIZER_FOLDERS[name] for name in encoders}
    for tokenizer in tokenizers.values():
        if not (tokenizer / "tokenizer.json").is_file() and not (
            (tokenizer / "vocab.json").is_file() and (tokenizer / "merges.txt").is_file()
        ):
            raise _missing(tokenizer.name, "neither tokenizer.json nor vocab.json with merges.txt")
    return Checkpoint(
        source=source,
        revision=revision,
        configs=configs,
        weights={part: weight_files(folder / part, part, variant) for part in parts},
        tokenizers=tokenizers,
        licenses=tuple(sorted(p for p in folder.iterdir() if _LICENSE_FILE.fullmatch(p.name))),
        license=card_license(folder / "README.md"),
        defaults=defaults,
        force_zeros_for_empty_prompt=variation
        or (is_xl(configs) and bool(index.get("force_zeros_for_empty_prompt", True))),
        max_noise_level=max_noise_level(configs, index),
    )


def _is_named(index: Mapping[str, Any], part: str) -> bool:
    """Whether model_index.json names a class for ``part``."""
    return (index.get(part) or [None, None])[1] is not None


def read_index(folder: Path, *, source: str) -> tuple[dict[str, Any], Defaults]:
    """model_index.json and what its pipeline draws with by default.

    `ExportError` where it is missing or of another kind; it is small, and read before the rest.
    """
    path = folder / "model_index.json"
    if path.is_file():
        index = read_json(path, component="checkpoint")
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


def weight_files(folder: Path, component: str, variant: str | None) -> tuple[Path, ...]:
    """The weight files of one model: safetensors before pickles, all shards of a sharded one."""
    stem = WEIGHT_STEMS.get(component, CONTROLNET_STEM)
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
