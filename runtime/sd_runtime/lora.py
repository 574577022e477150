"""LoRAs put on a bundle's engines when they are opened: W + scale · alpha / rank · up · down."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.errors import ConfigError
from sd_engines.spec import STABLE_DIFFUSION_XL
from sd_runtime.layer_table import LayerTable
from sd_runtime.lora_layers import LORA_HINT, LoraNotes, lora_error, lora_layers, model_layers
from sd_runtime.task import reads_image
from sd_runtime.tensor_file import TensorFile

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from sd_engines.bundle import Bundle

OWNERS = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "unet": "unet",
    "unet_shallow": "unet",
}
"""Components that LoRAs change, and whose layers they have."""
_ENCODER_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
"""Of a text encoder without a projection; in one with it they lie below its ``text_model``."""

_LARGEST = np.finfo(np.float16).max
"""No weight of a model is near what fp16 can hold, and with one beyond it no picture is finite."""


@dataclass(frozen=True)
class Lora:
    """One file and how strongly it is applied; ``sha256`` is of its bytes, as they are now."""

    path: Path
    scale: float
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        object.__setattr__(self, "sha256", digest)
        object.__setattr__(self, "path", self.path.absolute())  # it is read again, from anywhere

    def __str__(self) -> str:
        """As a picture's recipe names it: the same file by any name is the same."""
        return f"{self.sha256} {self.scale:g}"


def find_lora(text: str, suffixes: Collection[str] = (".safetensors",)) -> Lora:
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
        if path.is_dir():
            raise ConfigError(f"--lora {text}: is a folder", "Name the .safetensors file in it.")
        raise ConfigError(f"--lora {text}: no such file", LORA_HINT)
    if path.suffix not in suffixes:
        raise ConfigError(f"--lora {text}: not a weight file", f"Known: {', '.join(suffixes)}.")
    return Lora(path, scale)


def find_loras(loras: Sequence[str | Lora]) -> tuple[Lora, ...]:
    """The same for several, some of which may be found already."""
    if isinstance(loras, str):
        raise ConfigError(f"loras is {loras!r}, no list", "Give a list of one: [FILE].")
    return tuple(lora if isinstance(lora, Lora) else find_lora(lora) for lora in loras)


def check_unchanged(loras: Iterable[Lora]) -> None:
    """`ConfigError` where a file is no longer what it was when it was put on."""
    for lora in loras:
        if not lora.path.is_file() or replace(lora) != lora:  # which reads it anew
            raise ConfigError(
                f"{lora.path} was changed after it was put on the engines",
                "Put LoRAs on again before an engine is opened that was not needed so far.",
            )


def fused_weights(bundle: Bundle, component: str, loras: Sequence[Lora]) -> dict[str, NDArray[Any]]:
    """The weights of ``component`` that ``loras`` change, by what its graph calls them.

    Raises `ConfigError` for a file that is no LoRA of this model, or is too strong, `BundleError`
    for a bundle that does not say where its weights lie.
    """
    if loras and reads_image(bundle.manifest):
        raise ConfigError(
            "LoRAs are trained to prompts, and the bundle reads a picture instead",
            "Leave --lora out.",
        )
    if not loras or component not in OWNERS:
        return {}
    owner = OWNERS[component]
    owners = {OWNERS[name] for name in bundle.manifest.components if name in OWNERS}
    table = LayerTable.open(bundle, component)
    whole = table if component == owner else LayerTable.open(bundle, owner)
    xl = bundle.manifest.model.family == STABLE_DIFFUSION_XL
    names = {*whole.layers, *(_unread_layers(whole.layers) if xl else ())}
    changes: dict[str, list[tuple[Lora, partial[NDArray[np.float32]]]]] = {}
    for lora in loras:
        file, file_name = TensorFile.open(lora.path), lora.path.name
        notes = LoraNotes.read(file.metadata, file_name, component=owner)
        layers = lora_layers(file, file_name, components=owners).get(owner, {})
        found = model_layers(layers, names, file=file_name, component=owner)
        for name, (spelling, keys) in found.items():
            change = partial(
                lora_change, keys, file.read, layer=spelling, file=file_name, notes=notes
            )
            changes.setdefault(name, []).append((lora, change))
    fused = {}
    for name in table.layers:  # one weight at a time in float32
        if name not in changes:
            continue
        weight = table.read(name).copy()
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            for lora, change in changes[name]:
                weight += np.float32(lora.scale) * change(shape=weight.shape)
            stored = table.stored(name, weight)
        check_changed(name, stored, [lora for lora, _ in changes[name]])
        fused[table.initializer(name)] = stored
    return fused


def check_changed(layer: str, weight: NDArray[Any], loras: Iterable[Lora]) -> None:
    """`ConfigError` where ``weight``, which ``loras`` changed, is none that a model can have."""
    if not np.abs(weight).max() <= _LARGEST:  # nor is NaN
        files = " and ".join(f"{lora.path.name}={lora.scale:g}" for lora in loras)
        raise lora_error(f"{layer} is too large, or not finite, with {files}")


def _unread_layers(names: Collection[str]) -> set[str]:
    """Layers of a text encoder of Stable Diffusion XL that its graph, of ``names``, leaves out.

    The UNet reads the last layer but one of the first encoder, whose graph ends there. LoRAs have
    the last one too. None of anything else.
    """
    layers = {name: _ENCODER_LAYER.match(name) for name in names}
    last = max((int(layer[1]) for layer in layers.values() if layer), default=-1)
    return {
        f"encoder.layers.{last + 1}.{name[layer.end() :]}"
        for name, layer in layers.items()
        if layer and int(layer[1]) == last
    }


def lora_change(
    keys: Mapping[str, str],
    read: Callable[[str], NDArray[np.float32]],
    *,
    layer: str,
    file: str,
    notes: LoraNotes,
    shape: tuple[int, ...],
) -> NDArray[np.float32]:
    """What ``file`` adds to the weight of ``layer``, float32 [out, in, …] of ``shape``, at scale 1.

    ``keys`` are those of its "down", "up" and perhaps "alpha", which ``read`` reads. Raises
    `ConfigError` where they have another shape or are not finite.
    """
    down, up = read(keys["down"]), read(keys["up"])
    if min(down.ndim, up.ndim) < 2 or not down.size or not up.size:
        raise lora_error(f"{file}: {layer} is {up.shape} × {down.shape}, which no LoRA is")
    alpha = read(keys["alpha"]) if "alpha" in keys else None
    if alpha is not None and alpha.size != 1:
        raise lora_error(f"{file}: the alpha of {layer} is {alpha.size} numbers and not one")
    rank, columns = len(down), up.reshape(len(up), -1)
    if columns.shape != (shape[0], rank) or down[0].size != math.prod(shape[1:]):
        raise lora_error(
            f"{file}: {layer} is {up.shape} × {down.shape}, of another shape than the model's "
            f"{shape}"
        )
    strength = notes.strength(layer, rank=rank, alpha=None if alpha is None else alpha.item())
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below
        product = (columns @ down.reshape(rank, -1)).reshape(shape)
        change: NDArray[np.float32] = np.float32(strength) * product
    if not np.isfinite(change).all():
        raise lora_error(f"{file}: {layer} is not finite")
    return change
