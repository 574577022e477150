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
    from sd_engines.entries import FileEntry

_DTYPES = {"float": np.float32, "float16": np.float16}


def table_file(onnx_file: str) -> str:
    """What the table of the graph ``model….onnx`` is called: ``layers….json``."""
    return onnx_file.replace("model", "layers", 1).removesuffix(".onnx") + ".json"


@dataclass(frozen=True)
class _Layer:
    """Where one weight lies, and how: ``shape`` is the graph's, whichever way it is turned."""

    initializer: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    file: str
    offset: int

    def problem(self, files: Mapping[str, FileEntry], component: str) -> str | None:
        """What no graph of ``component`` can have; None where it lies in one of its ``files``."""
        kinds = {"initializer": str, "dtype": str, "transposed": bool, "file": str}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                return f"{name} is no {kind.__name__}"
        if len(self.shape) < 2 or any(type(size) is not int or size < 1 for size in self.shape):
            return f"{list(self.shape)[:8]} is no shape of a layer's weight"
        if f"{component}/{self.file}" not in files:
            return "names a file that the manifest does not list"
        bytes_ = math.prod(self.shape) * np.dtype(_DTYPES.get(self.dtype, np.uint8)).itemsize
        end = files[f"{component}/{self.file}"].bytes
        if type(self.offset) is not int or not 0 <= self.offset <= end - bytes_:
            return f"lies outside of {self.file}"
        return None


@dataclass(frozen=True)
class LayerTable:
    """The linear and convolutional layers of one component by their names in the checkpoint."""

    folder: Path
    layers: Mapping[str, _Layer]

    @classmethod
    def open(cls, bundle: Bundle, component: str) -> Self:
        """That of ``component``, checked; `BundleError` where there is none to be trusted."""
        graph = bundle.verified_path(component)
        path = graph.with_name(table_file(graph.name))
        files = bundle.manifest.components[component].files
        hint = f"Make it again: sd-export --model {bundle.manifest.model.source} --output BUNDLE."
        if f"{component}/{path.name}" not in files:
            raise BundleError(
                f"{bundle.path}: does not say where the weights of {component} lie", hint
            )
        try:
            entries = json.loads(path.read_bytes())
            layers = {
                name: _Layer(**{**entry, "shape": tuple(entry["shape"])})
                for name, entry in entries.items()
            }
            for name, layer in layers.items():
                if problem := layer.problem(files, component):
                    raise ValueError(f"{name}: {problem}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BundleError(f"{path}: {error}", hint) from error
        return cls(path.parent, layers)

    def initializer(self, layer: str) -> str:
        """What the graph calls the weight of ``layer``."""
        return self.layers[layer].initializer

    def read(self, layer: str) -> NDArray[np.float32]:
        """The weight of ``layer``, [out, in, …] as in its checkpoint."""
        place = self.layers[layer]
        path, count = self.folder / place.file, math.prod(place.shape)
        stored = np.fromfile(path, _dtype(place), count, offset=place.offset).reshape(place.shape)
        return np.asarray(stored.T if place.transposed else stored, np.float32)

    def stored(self, layer: str, weight: NDArray[np.float32]) -> NDArray[Any]:
        """``weight`` [out, in, …] as the graph holds it."""
        place = self.layers[layer]
        return np.ascontiguousarray(weight.T if place.transposed else weight, _dtype(place))


def _dtype(layer: _Layer) -> Any:
    if layer.dtype not in _DTYPES:
        raise BundleError(
            f"weights in {layer.dtype} cannot be changed", "Fuse the LoRA: sd-export … --lora FILE."
        )
    return _DTYPES[layer.dtype]
