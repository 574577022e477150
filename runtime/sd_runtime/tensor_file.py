"""Reads safetensors files with numpy alone (https://github.com/huggingface/safetensors)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_MAX_HEADER_BYTES = 100 * 2**20
_HINT = "Download it again, or save it as safetensors of real numbers."


@dataclass(frozen=True)
class _Place:
    dtype: str
    shape: tuple[int, ...]
    begin: int


class TensorFile:
    """The tensors of one file by name, read from the disk when asked for.

    ``metadata`` are the file's own notes, all text. Raises `ConfigError` where it is no such file.
    """

    def __init__(
        self, path: Path, places: Mapping[str, _Place], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self._places = places

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the header of ``path`` and check every place in it."""
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if not 2 <= size <= _MAX_HEADER_BYTES:
                    raise ValueError("its header has no length")
                header = json.loads(file.read(size))
            metadata = header.pop("__metadata__", {})
            end = path.stat().st_size - 8 - size
            places = {name: _place(entry, 8 + size, end) for name, entry in header.items()}
        except (
            *(OSError, ValueError, OverflowError, TypeError),
            *(KeyError, AttributeError, RecursionError),
        ) as error:
            raise ConfigError(f"{path} is no safetensors file: {error}", _HINT) from error
        return cls(path, places, {str(key): str(value) for key, value in metadata.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, name: str) -> NDArray[np.float32]:
        """The tensor ``name``, widened or narrowed to float32."""
        place = self._places[name]
        count = math.prod(place.shape)
        array = np.fromfile(self.path, _DTYPES[place.dtype], count, offset=place.begin)
        if place.dtype == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32, copy=False).reshape(place.shape)


def _place(entry: Mapping[str, Any], start: int, end: int) -> _Place:
    dtype, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
    if dtype not in _DTYPES:
        raise ValueError(f"a tensor is of {dtype}")
    first, last = (int(offset) for offset in entry["data_offsets"])
    bytes_ = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if min(shape, default=0) < 0 or not 0 <= first <= last <= end or last - first != bytes_:
        raise ValueError("a tensor lies outside of it")
    return _Place(dtype, shape, start + first)
