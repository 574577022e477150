"""LoRA files, fused into a model's weights when it is loaded: W + scale · alpha / rank · up · down.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685. Files of
kohya's scripts, of diffusers (old and new) and of PEFT name the same layers differently; each
layer of the model is looked up by all its names, and a key that belongs to none is an error.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sd_engines.errors import ConfigError, ExportError
from sd_export.weights import Place, Weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_PARTS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
"""How a key ends, and what it then holds."""
_OWNERS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "base_model.model.": "unet",
}
"""How a key begins, and whose layer it then is; the UNet's where it begins otherwise."""
_METADATA = "lora_adapter_metadata"
_OLD_TEXT_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt")
_USE = "Give a LoRA of Stable Diffusion's own size: FILE.safetensors or FILE.safetensors=SCALE."


@dataclass(frozen=True)
class Lora:
    """One file and how strongly it is applied."""

    path: Path
    scale: float


def find_lora(text: str) -> Lora:
    """The LoRA that ``FILE`` or ``FILE=SCALE`` names; `ConfigError` where there is none."""
    path, scale = Path(text).expanduser(), 1.0
    name, equals, number = text.rpartition("=")
    if equals and not path.exists():
        path = Path(name).expanduser()
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise ConfigError(f"--lora {text}: {number!r} is no scale", "Such as FILE=0.8.")
    if not path.is_file():
        raise ConfigError(f"--lora {text}: no such file", _USE)
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"--lora {text}: not a weight file", f"Known: {', '.join(_SUFFIXES)}.")
    with Weights((path,), component="lora") as weights:
        _layers(weights, path)
    return Lora(path, scale)


def fuse_loras(module: torch.nn.Module, component: str, loras: Sequence[Lora]) -> None:
    """Add ``loras`` to the weights of ``module``, which is the checkpoint's ``component``.

    Raises `ExportError` for a layer that the model does not have, or has in another shape.
    """
    layers = {
        spelling: layer
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        for spelling in _spellings(name)
    }
    for lora in loras:
        with Weights((lora.path,), component=component) as weights:
            notes = _Notes.read(weights.notes, component)
            for name, keys in _layers(weights, lora.path).get(component, {}).items():
                if name not in layers:
                    raise _error(f"{lora.path.name} changes {name}, which it has not", component)
                parts = {part: weights.tensor(Place(key)).float() for part, key in keys.items()}
                alpha = float(parts["alpha"]) if "alpha" in parts else None
                strength = notes.strength(name, rank=len(parts["down"]), alpha=alpha)
                product = _product(parts["up"], parts["down"], like=layers[name].weight)
                if product is None:
                    raise _error(
                        f"{lora.path.name}: {name} is {tuple(parts['up'].shape)} × "
                        f"{tuple(parts['down'].shape)}, not finite or of another shape than the "
                        f"model's {tuple(layers[name].weight.shape)}",
                        component,
                    )
                with torch.no_grad():
                    layers[name].weight += lora.scale * strength * product


def _product(up: torch.Tensor, down: torch.Tensor, *, like: torch.Tensor) -> torch.Tensor | None:
    """Up [out, rank, …] · down [rank, in, …] in the shape of ``like``; None where it has none."""
    if up.flatten(1).shape != (len(like), len(down)) or down[0].numel() != like[0].numel():
        return None
    product = (up.flatten(1) @ down.flatten(1)).reshape(like.shape)
    return product if bool(torch.isfinite(product).all()) else None


def _layers(weights: Weights, path: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Component → its layer, as the file spells it → "down", "up" and "alpha" → key in the file.

    `ExportError` for a key that is no part of a LoRA, or a layer without its other half.
    """
    found: dict[str, dict[str, dict[str, str]]] = {}
    for key in weights:
        ending = next((ending for ending in _PARTS if key.endswith(ending)), None)
        if ending is None:
            raise _error(f"{path.name} holds {key}, which is no part of a LoRA", "lora")
        start = next((start for start in _OWNERS if key.startswith(start)), "")
        owner = _OWNERS.get(start, "unet")
        if owner == "text_encoder_2":
            raise _error(f"{path.name} is for Stable Diffusion XL: it changes {key}", "lora")
        name = key[len(start) : -len(ending)]
        found.setdefault(owner, {}).setdefault(name, {})[_PARTS[ending]] = key
    for layers in found.values():
        for name, parts in layers.items():
            if not {"down", "up"} <= parts.keys():
                raise _error(f"{path.name} has one half of {name} without the other", "lora")
    if not found:
        raise _error(f"{path.name} is empty", "lora")
    return found


def _spellings(name: str) -> Iterator[str]:
    """All names of the layer that today's libraries call ``name``, without their beginnings."""
    yield name
    yield name.replace(".", "_")
    yield f"text_model.{name}"
    yield f"text_model_{name.replace('.', '_')}"
    head, _, last = name.rpartition(".")
    if last in _OLD_TEXT_ATTENTION:
        yield f"text_model.{head}.{_OLD_TEXT_ATTENTION[last]}"
    processor = re.fullmatch(r"(.+\.attn\d)\.(to_[qkv]|to_out)(\.0)?", name)
    if processor:
        yield f"{processor[1]}.processor.{processor[2]}"


@dataclass(frozen=True)
class _Notes:
    """What diffusers and PEFT note beside the weights of one component."""

    alpha: float | None
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    @classmethod
    def read(cls, metadata: Mapping[str, str], component: str) -> _Notes:
        """Of a file's ``metadata``, which may have none."""
        try:
            noted: Mapping[str, Any] = json.loads(metadata.get(_METADATA, "{}"))
            alpha = noted.get(f"{component}.lora_alpha")
            return cls(
                alpha=None if alpha is None else float(alpha),
                alpha_pattern={
                    str(name): float(value)
                    for name, value in noted.get(f"{component}.alpha_pattern", {}).items()
                },
                use_rslora=bool(noted.get(f"{component}.use_rslora", False)),
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise _error(f"its {_METADATA} cannot be read: {error}", "lora") from error

    def strength(self, name: str, *, rank: int, alpha: float | None) -> float:
        """Layer ``name``'s factor; ``alpha`` is the file's own. Without any, it is 1."""
        if alpha is None:
            alpha = self.alpha_pattern.get(name, self.alpha)
        divisor = math.sqrt(rank) if self.use_rslora else rank
        return (rank if alpha is None else alpha) / divisor


def _error(message: str, component: str) -> ExportError:
    return ExportError(message, _USE, component=component, stage="load")
