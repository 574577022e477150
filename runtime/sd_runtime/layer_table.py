"""The layers of a component and where their weights lie, as its ``layers.json`` says.

engines/README.md has the format.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sd_engines.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from sd_engines.bundle import Bundle

TABLE_FILE = "layers.json"
_DTYPES = {"float": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class LayerTable:
    """The linear and convolutional layers of one component by their names in the checkpoint."""

    folder: Path
    layers: Mapping[str, Mapping[str, Any]]

    @classmethod
    def open(cls, bundle: Bundle, component: str) -> Self:
        """That of ``component``, checked; `BundleError` where an older bundle has none."""
        folder = bundle.verified_path(component).parent
        if f"{component}/{TABLE_FILE}" not in bundle.manifest.components[component].files:
            raise BundleError(
                f"{bundle.path}: does not say where the weights of {component} lie",
                f"Make it again: sd-export --model {bundle.manifest.model.source} --output BUNDLE.",
            )
        return cls(folder, json.loads((folder / TABLE_FILE).read_bytes()))

    def initializer(self, layer: str) -> str:
        """What the graph calls the weight of ``layer``."""
        return str(self.layers[layer]["initializer"])

    def read(self, layer: str) -> NDArray[np.float32]:
        """The weight of ``layer``, [out, in, …] as in its checkpoint."""
        entry = self.layers[layer]
        path, count = self.folder / entry["file"], math.prod(entry["shape"])
        stored = np.fromfile(path, self._dtype(layer), count, offset=entry["offset"])
        stored = stored.reshape(entry["shape"])
        return np.asarray(stored.T if entry["transposed"] else stored, np.float32)

    def stored(self, layer: str, weight: NDArray[np.float32]) -> NDArray[Any]:
        """``weight`` [out, in, …] as the graph holds it."""
        turned = weight.T if self.layers[layer]["transposed"] else weight
        return np.ascontiguousarray(turned, self._dtype(layer))

    def _dtype(self, layer: str) -> Any:
        name = self.layers[layer]["dtype"]
        if name not in _DTYPES:
            raise BundleError(
                f"weights in {name} cannot be changed", "Fuse the LoRA: sd-export … --lora FILE."
            )
        return _DTYPES[name]
