"""Another VAE in a checkpoint's place of its own: a fine-tuned decoder, mostly.

It must speak the checkpoint's latents: as many channels, as many pixels each, the same scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ConfigError, ExportError
from sd_export.config_fields import checked_config
from sd_export.family import vae_scale_factor
from sd_export.hub import Snapshot, find_snapshot
from sd_export.model_files import read_json
from sd_export.source import SINGLE_FILE_SUFFIXES, local_path
from sd_export.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sd_export.checkpoint import Checkpoint

_SUFFIXES = (*SINGLE_FILE_SUFFIXES, ".pt")
_USE = (
    "Name a VAE of the checkpoint's family: a Hub id such as stabilityai/sd-vae-ft-mse, a folder "
    "with its config.json, or a .safetensors, .ckpt or .pt file in the original layout."
)


@dataclass(frozen=True, kw_only=True)
class Vae:
    """Where a VAE by itself lies, and its config in diffusers' words.

    ``single_file`` means the original layout: its names are to be translated.
    """

    source: str
    revision: str | None
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    single_file: bool


def with_vae(checkpoint: Checkpoint, model: str) -> Checkpoint:
    """``checkpoint`` with the VAE that ``model`` names: a path that exists, else an id on the Hub.

    Of a whole checkpoint its VAE is taken. Raises `ConfigError` for a name that is neither,
    `ExportError` for what cannot be had, is no VAE, or is one of other latents.
    """
    vae = _find(model)
    own = checkpoint.configs["vae"]
    problem = _difference(vae.config, own)
    if problem is not None:
        raise _error(f"{model} does not fit the checkpoint: {problem}")
    return replace(
        checkpoint,
        configs={**checkpoint.configs, "vae": vae.config},
        weights={**checkpoint.weights, "vae": vae.weights},
        vae=vae,
    )


def _find(model: str) -> Vae:
    path = local_path(model, hint=_USE, suffixes=_SUFFIXES)
    if path is not None and path.is_file():
        return _of_file(model, path)
    return _of_folder(find_snapshot(model, path))


def vae_folder(folder: Path) -> Path:
    """Where the VAE of ``folder`` lies, which is one by itself or a whole checkpoint."""
    return folder if (folder / "config.json").is_file() else folder / "vae"


def _of_folder(found: Snapshot) -> Vae:
    model, folder = found.model, vae_folder(found.folder)
    if not (folder / "config.json").is_file():
        raise _error(f"{model} holds no VAE: it has neither config.json nor vae/config.json")
    config = checked_config("vae", read_json(folder / "config.json", component="vae"))
    kind = config.get("_class_name")
    if kind != "AutoencoderKL":
        raise _error(f"{model} holds a {kind or 'model of no known class'}, not an AutoencoderKL")
    weights = found.fetch_weights(folder, "vae")
    Weights(weights, component="vae").close()  # refused now rather than after the UNet
    return Vae(
        source=model,
        revision=found.commit,
        config=config,
        weights=weights,
        single_file=False,
    )


def _of_file(model: str, path: Path) -> Vae:
    from sd_export.single_file import single_file_vae_config

    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"--vae {model}: not a weight file", _USE)
    with Weights((path,), component="vae") as weights:
        config = single_file_vae_config(weights)
    if config is None:
        raise _error(f"{model} holds no VAE in the original layout")
    return Vae(source=model, revision=None, config=config, weights=(path,), single_file=True)


def _difference(config: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """What tells the latents of two VAEs apart, in words; None where nothing does."""
    if config.get("shift_factor") or config.get("latents_mean"):
        return "it shifts its latents"
    for words, key, default in (
        ("channels of latents", "latent_channels", 4),
        ("as its scaling factor", "scaling_factor", 0.18215),
        ("channels of pictures", "out_channels", 3),
    ):
        found, wanted = config.get(key, default), own.get(key, default)
        if found != wanted:
            return f"it has {found} {words}, the checkpoint's own {wanted}"
    factors = [vae_scale_factor(c["block_out_channels"]) for c in (config, own)]
    if factors[0] != factors[1]:
        return f"it makes {factors[0]} pixels of one latent, the checkpoint's own {factors[1]}"
    return None


def _error(message: str) -> ExportError:
    return ExportError(message, _USE, component="vae", stage="load")
