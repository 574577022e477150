"""LoRAs fused into a model's weights when it is loaded: W + scale · alpha / rank · up · down."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sd_export.weights import Place, Weights
from sd_runtime import lora as runtime_lora
from sd_runtime.lora import lora_change
from sd_runtime.lora_layers import LoraNotes, lora_error, lora_layers, spellings_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_runtime.lora import Lora

_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt")


def find_lora(text: str) -> Lora:
    """The LoRA that ``FILE`` or ``FILE=SCALE`` names, its keys read.

    `ConfigError` where there is none or it is none.
    """
    lora = runtime_lora.find_lora(text, _SUFFIXES)
    with Weights((lora.path,), component="lora") as weights:
        lora_layers(weights, lora.path.name)
    return lora


def fuse_loras(module: torch.nn.Module, component: str, loras: Sequence[Lora]) -> None:
    """Add ``loras`` to the weights of ``module``, which is the checkpoint's ``component``.

    Raises `ConfigError` for a layer that the model does not have, or has in another shape.
    """
    layers = {
        spelling: layer
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        for spelling in spellings_of(name)
    }
    for lora in loras:
        with Weights((lora.path,), component=component) as weights:
            notes = LoraNotes.read(weights.notes, component)
            for name, keys in lora_layers(weights, lora.path.name).get(component, {}).items():
                if name not in layers:
                    raise lora_error(
                        f"{lora.path.name} changes {name} of the {component}, which it has not"
                    )
                weight = layers[name].weight
                change = lora_change(
                    keys,
                    lambda key: weights.tensor(Place(key)).float().numpy(),
                    layer=name,
                    file=lora.path.name,
                    notes=notes,
                    shape=tuple(weight.shape),
                )
                with torch.no_grad():
                    weight += lora.scale * torch.from_numpy(change)
