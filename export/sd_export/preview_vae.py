"""A tiny decoder beside a checkpoint: pictures on the way at a fraction of what the VAE's take.

Ollin Boer Bohan's TAESD (https://github.com/madebyollin/taesd), which diffusers has as
AutoencoderTiny. Its encoder is not used, and the last picture is the VAE's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sd_engines.errors import ConfigError, ExportError
from sd_export.config_fields import checked_config
from sd_export.family import latent_channels, vae_scale_factor
from sd_export.hub import find_snapshot
from sd_export.model_files import read_json
from sd_export.source import local_path
from sd_export.vae import Vae, vae_folder
from sd_export.weights import Weights

if TYPE_CHECKING:
    from sd_export.checkpoint import Checkpoint

PREVIEW_VAE = "preview_vae"
_HINT = "Name a tiny VAE of the checkpoint's family: madebyollin/taesd, or a folder as diffusers'."


def with_preview_vae(checkpoint: Checkpoint, model: str) -> Checkpoint:
    """``checkpoint`` with the AutoencoderTiny that ``model`` names: a folder, or an id on the Hub.

    Raises `ConfigError` for a name that is neither, `ExportError` for what cannot be had, is no
    such VAE, or reads other latents.
    """
    path = local_path(model, hint=_HINT)
    if path is not None and not path.is_dir():
        raise ConfigError(f"--preview-vae {model} is no folder", _HINT)
    snapshot = find_snapshot(model, path)
    folder = vae_folder(snapshot.folder)
    config = checked_config(PREVIEW_VAE, read_json(folder / "config.json", component=PREVIEW_VAE))
    kind = config.get("_class_name")
    if kind != "AutoencoderTiny":
        raise _error(f"{model} holds a {kind}, not an AutoencoderTiny")
    for words, found, wanted in (
        ("channels of latents", latent_channels(config), checkpoint.latent_channels),
        (
            "pixels a latent",
            vae_scale_factor(config.get("decoder_block_out_channels", (64,) * 4)),
            checkpoint.vae_scale_factor,
        ),
    ):
        if found != wanted:
            raise _error(f"{model} has {found} {words}, the checkpoint's own VAE {wanted}")
    weights = snapshot.fetch_weights(folder, "vae")
    Weights(weights, component=PREVIEW_VAE).close()  # refused now rather than after the UNet
    return replace(
        checkpoint,
        configs={**checkpoint.configs, PREVIEW_VAE: config},
        weights={**checkpoint.weights, PREVIEW_VAE: weights},
        preview_vae=Vae(
            source=model,
            revision=snapshot.commit,
            config=config,
            weights=weights,
            single_file=False,
        ),
    )


def _error(message: str) -> ExportError:
    return ExportError(message, _HINT, component=PREVIEW_VAE, stage="load")
