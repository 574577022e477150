"""A picture in tiles of one size: where they lie, which noise they see, how they are joined.

Engines have one shape, pictures have any. Tiles overlap, and what two of them draw of one place is
mixed, the more of a tile the deeper inside it the place is. Neighbours see the same noise where
they overlap, so that they draw much the same there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from sd_runtime.noise import NoiseStream

if TYPE_CHECKING:
    from numpy.typing import NDArray

_T = TypeVar("_T", bound=np.generic)
_OVERLAP = 4
"""Neighbours share at least a tile's side divided by this."""


class Tile(NamedTuple):
    """Where a tile begins, in pixels of the picture that is cut."""

    top: int
    left: int


@dataclass(frozen=True)
class Tiling:
    """Overlapping tiles that cover a picture; one, and wider than it, where it is smaller.

    They begin at multiples of ``grid``, of which their sides are multiples too.
    """

    height: int
    width: int
    tile_height: int
    tile_width: int
    grid: int = 1

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All of them, row by row, as evenly spread as whole pixels allow."""
        return tuple(
            Tile(top, left)
            for top in _starts(self.height, self.tile_height, self.grid)
            for left in _starts(self.width, self.tile_width, self.grid)
        )

    def cut(self, picture: NDArray[_T], tile: Tile) -> NDArray[_T]:
        """One tile of ``picture`` [height, width, c]; its edge is repeated beyond it."""
        height, width = self.tile_height, self.tile_width
        part = picture[tile.top : tile.top + height, tile.left : tile.left + width]
        beyond = ((0, height - part.shape[0]), (0, width - part.shape[1]), (0, 0))
        return np.pad(part, beyond, mode="edge")

    def join(self, drawn: NDArray[Any]) -> NDArray[np.float32]:
        """The picture of what was drawn of its `tiles`, [n, f·tile_height, f·tile_width, c].

        It is f times as large as the one that was cut: float32 [f·height, f·width, c].
        """
        high, wide, channels = drawn.shape[1:]
        scale = high // self.tile_height
        weight = np.outer(_depths(high), _depths(wide))[..., None]
        last = self.tiles[-1]
        size = scale * (last.top + self.tile_height), scale * (last.left + self.tile_width)
        total = np.zeros((*size, channels), np.float32)
        weights = np.zeros((*total.shape[:2], 1), np.float32)
        for (top, left), pixels in zip(self.tiles, drawn, strict=True):
            rows = slice(scale * top, scale * top + high)
            columns = slice(scale * left, scale * left + wide)
            total[rows, columns] += weight * pixels
            weights[rows, columns] += weight
        total /= weights
        return total[: scale * self.height, : scale * self.width]


class TileNoise(NoiseStream):
    """A tile's part of the noise of a whole picture; every draw is another such noise.

    It lies in cells of the size that is drawn, row by row from the upper left. That first cell is
    ``seed``'s own stream, so a picture of one tile has the noise that it would have without tiles.
    The cell in row r and column c is the stream of another seed: the first four bytes, big-endian,
    of the SHA-256 of "seed r c", in decimal digits. Draws may be finer or coarser than the picture
    that is cut, as latents are.
    """

    def __init__(self, seed: int, tile: Tile, *, tile_height: int, tile_width: int) -> None:
        super().__init__(seed)
        self._side = tile_height, tile_width
        self._inside = tile.top % tile_height, tile.left % tile_width
        rows = range(tile.top // tile_height, -(-tile.top // tile_height) + 1)
        columns = range(tile.left // tile_width, -(-tile.left // tile_width) + 1)
        self._cells = [
            [NoiseStream(_cell_seed(seed, row, column)) for column in columns] for row in rows
        ]

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The tile's part of the next draw, float32 of ``shape``, whose last axes are its sides."""
        rows = [np.concatenate([cell.normal(shape) for cell in row], -1) for row in self._cells]
        whole = np.concatenate(rows, -2)
        top, left = (
            start * size // side
            for start, size, side in zip(self._inside, shape[-2:], self._side, strict=True)
        )
        return whole[..., top : top + shape[-2], left : left + shape[-1]]


def _starts(size: int, tile: int, grid: int) -> list[int]:
    size, tile = -(-size // grid), tile // grid
    if size <= tile:
        return [0]
    shared = tile // _OVERLAP
    steps = -(-(size - tile) // (tile - shared))
    return [(size - tile) * step // steps * grid for step in range(steps + 1)]


def _depths(size: int) -> NDArray[np.float32]:
    """How deep inside a side of ``size`` each pixel is, from 1."""
    upward = np.arange(1, size + 1, dtype=np.float32)
    return np.minimum(upward, upward[::-1])


def _cell_seed(seed: int, row: int, column: int) -> int:
    if row == column == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {row} {column}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
