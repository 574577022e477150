"""LoRAs fused into a model's weights when it is loaded: W + scale · alpha / rank · up · down."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sd_export.weights import Place, Weights
from sd_runtime import lora as runtime_lora
from sd_runtime.lora import check_changed, lora_change
from sd_runtime.lora_layers import LoraNotes, lora_layers, model_layers

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sd_runtime.lora import Lora

_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt")


def find_lora(text: str, *, components: Collection[str]) -> Lora:
    """The LoRA that ``FILE`` or ``FILE=SCALE`` names, its keys read.

    `ConfigError` where there is none, or it is none of a checkpoint with these ``components``.
    """
    lora = runtime_lora.find_lora(text, _SUFFIXES)
    with Weights((lora.path,), component="lora") as weights:
        lora_layers(weights, lora.path.name, components=components)
    return lora


def fuse_loras(
    module: torch.nn.Module, component: str, loras: Sequence[Lora], *, components: Collection[str]
) -> None:
    """Add ``loras`` to the weights of ``module``, the ``component`` of the checkpoint's several.

    Raises `ConfigError` for a layer that the model does not have, has in another shape, or that
    becomes too large.
    """
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }
    changed: dict[str, list[Lora]] = {}
    for lora in loras:
        file = lora.path.name
        with Weights((lora.path,), component=component) as weights:
            notes = LoraNotes.read(weights.notes, file, component=component)
            in_file = lora_layers(weights, file, components=components).get(component, {})
            found = model_layers(in_file, layers, file=file, component=component)
            for name, (spelling, keys) in found.items():
                weight = layers[name].weight
                change = lora_change(
                    keys,
                    lambda key: weights.tensor(Place(key)).float().numpy(),
                    layer=spelling,
                    file=file,
                    notes=notes,
                    shape=tuple(weight.shape),
                )
                with torch.no_grad():
                    weight += lora.scale * torch.from_numpy(change)
                changed.setdefault(name, []).append(lora)
    for name, by in changed.items():
        check_changed(name, layers[name].weight.numpy(), by)
