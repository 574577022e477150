"""How LoRA files spell the layers that they change, and how strongly they change them.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685. Files of
kohya's scripts, of diffusers (old and new) and of PEFT name the same layers differently; each
layer of a model is looked up by all its names, and a key that belongs to none is an error. kohya's
name a UNet's layers as diffusers does or, of Stable Diffusion XL, as the original layout does.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from sd_engines.errors import ConfigError
from sd_runtime.original_layout import original_unet_names

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

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
_MODELS_WITH = {
    "unet": "another model",
    "text_encoder": "a model that is no refiner",
    "text_encoder_2": "Stable Diffusion XL",
}
"""What is meant where a model lacks the component."""
_METADATA = "lora_adapter_metadata"
_OLD_TEXT_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
LORA_HINT = (
    "Give a LoRA of Stable Diffusion's own size: FILE.safetensors or FILE.safetensors=SCALE."
)


def lora_layers(
    keys: Iterable[str], file: str, *, components: Collection[str]
) -> dict[str, dict[str, dict[str, str]]]:
    """Component → its layer, as ``file`` spells it → "down", "up" and "alpha" → key in the file.

    ``components`` are the model's. `ConfigError` for a key that is no part of a LoRA or of none of
    them, or a layer without its other half.
    """
    found: dict[str, dict[str, dict[str, str]]] = {}
    for key in keys:
        ending = next((ending for ending in _PARTS if key.endswith(ending)), None)
        if ending is None:
            raise lora_error(f"{file} holds {key}, which is no part of a LoRA")
        start = next((start for start in _OWNERS if key.startswith(start)), "")
        owner = _OWNERS.get(start, "unet")
        if owner not in components:
            raise lora_error(f"{file} is for {_MODELS_WITH[owner]}: it changes {key}")
        name = key[len(start) : -len(ending)]
        found.setdefault(owner, {}).setdefault(name, {})[_PARTS[ending]] = key
    for layers in found.values():
        for name, parts in layers.items():
            if not {"down", "up"} <= parts.keys():
                raise lora_error(f"{file} has one half of {name} without the other")
    if not found:
        raise lora_error(f"{file} is empty")
    return found


def model_layers(
    layers: Mapping[str, Mapping[str, str]], names: Collection[str], *, file: str, component: str
) -> dict[str, tuple[str, Mapping[str, str]]]:
    """A component's layer as today's libraries call it → as ``file`` spells it, and its keys.

    ``layers`` are the component's of `lora_layers`; ``names`` all that it has, by whose places the
    original layout names them. `ConfigError` for a layer that is none of them, or is there twice.
    """
    spelled = {spelling: name for name in names for spelling in _spellings_of(name)}
    for original, name in original_unet_names(names).items():
        spelled[original.replace(".", "_")] = name
    found: dict[str, tuple[str, Mapping[str, str]]] = {}
    for spelling, keys in layers.items():
        if spelling not in spelled:
            raise lora_error(f"{file} changes {spelling} of the {component}, which it has not")
        name = spelled[spelling]
        if name in found:
            raise lora_error(f"{file} changes {name} twice, as {found[name][0]} and as {spelling}")
        found[name] = spelling, keys
    return found


def _spellings_of(name: str) -> Iterator[str]:
    """All names of the layer that diffusers has given it, and kohya, without their beginnings."""
    yield name
    yield name.replace(".", "_")
    bare = name.removeprefix("text_model.")
    yield f"text_model.{bare}"
    yield f"text_model_{bare.replace('.', '_')}"
    head, _, last = bare.rpartition(".")
    if last in _OLD_TEXT_ATTENTION:
        yield f"text_model.{head}.{_OLD_TEXT_ATTENTION[last]}"
    processor = re.fullmatch(r"(.+\.attn\d)\.(to_[qkv]|to_out)(\.0)?", name)
    if processor:
        yield f"{processor[1]}.processor.{processor[2]}"


@dataclass(frozen=True)
class LoraNotes:
    """What diffusers and PEFT note beside the weights of one component."""

    alpha: float | None
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    @classmethod
    def read(cls, metadata: Mapping[str, str], file: str, *, component: str) -> Self:
        """Of the ``metadata`` of ``file``, which may have none."""
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
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise lora_error(f"{file}: its {_METADATA} cannot be read: {error}") from error

    def strength(self, name: str, *, rank: int, alpha: float | None) -> float:
        """Layer ``name``'s factor; ``alpha`` is the file's own. Without any, it is 1."""
        if alpha is None:
            alpha = self.alpha_pattern.get(name, self.alpha)
        divisor = math.sqrt(rank) if self.use_rslora else rank
        return (rank if alpha is None else alpha) / divisor


def lora_error(message: str) -> ConfigError:
    """What is wrong with a LoRA."""
    return ConfigError(message, LORA_HINT)
