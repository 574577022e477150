"""Tiles: they cover the picture, see one noise, and are joined without a trace of where."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from sd_runtime.noise import NoiseStream
from sd_runtime.tiles import Tile, TileNoise, Tiling

SIZES = [(8, 8), (9, 8), (13, 20), (15, 31), (100, 3), (5, 6)]


def noise(seed: int, tile: Tile) -> TileNoise:
    return TileNoise(seed, tile, tile_height=8, tile_width=8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_cover_the_picture_and_overlap(height: int, width: int) -> None:
    tiling = Tiling(height, width, 8, 8)
    assert len(set(tiling.tiles)) == len(tiling.tiles)
    covered = np.zeros((max(height, 8), max(width, 8)), int)
    for top, left in tiling.tiles:
        covered[top : top + 8, left : left + 8] += 1
        assert covered[top : top + 8, left : left + 8].shape == (8, 8)  # not one beyond the edge
    assert covered.all()
    for axis in (0, 1):
        starts = sorted({tile[axis] for tile in tiling.tiles})
        assert all(after - before <= 6 for before, after in pairwise(starts))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_what_is_cut_is_joined_again(height: int, width: int) -> None:
    tiling = Tiling(height, width, 8, 8)
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    drawn = np.stack([tiling.cut(picture, tile) for tile in tiling.tiles])
    np.testing.assert_array_equal(tiling.join(drawn), picture)
    larger = drawn.repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_array_equal(tiling.join(larger), picture.repeat(4, axis=0).repeat(4, axis=1))


def test_a_smaller_picture_goes_on_with_its_edge() -> None:
    picture = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    part = Tiling(1, 2, 2, 4).cut(picture, Tile(0, 0))
    np.testing.assert_array_equal(part[1], part[0])
    np.testing.assert_array_equal(part[0], picture[0][[0, 1, 1, 1]])


def test_tiles_that_differ_are_mixed_little_by_little() -> None:
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    tiling = Tiling(8, 14, 8, 8)
    assert tiling.tiles == (Tile(0, 0), Tile(0, 6))
    (row, *others) = tiling.join(np.stack([black, white]))[..., 0]
    assert row.tolist() == [0] * 6 + [85, 170] + [255] * 6  # the two that both drew
    assert all((other == row).all() for other in others)


def test_a_picture_of_one_tile_has_the_noise_of_its_seed() -> None:
    tile, plain = noise(7, Tile(0, 0)), NoiseStream(7)
    for shape in ((1, 3, 8, 8), (1, 4, 8, 8)):
        np.testing.assert_array_equal(tile.normal(shape), plain.normal(shape))


def test_tiles_see_the_same_noise_where_they_overlap() -> None:
    streams = {tile: noise(7, tile) for tile in Tiling(13, 20, 8, 8).tiles}
    for shape in ((1, 3, 8, 8), (1, 4, 8, 8)):  # every draw of them, and not only the first
        whole = np.full((*shape[:2], 13, 20), np.nan, np.float32)
        for (top, left), stream in streams.items():
            part = stream.normal(shape)
            assert part.shape == shape
            before = whole[..., top : top + 8, left : left + 8]
            np.testing.assert_array_equal(np.where(np.isnan(before), part, before), part)
            whole[..., top : top + 8, left : left + 8] = part
        assert abs(whole.mean()) < 0.2
        assert abs(whole.std() - 1) < 0.2
        assert len(np.unique(whole)) > 0.99 * whole.size  # no cell is another's again


def test_tiles_begin_where_a_latent_does() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (29, 41, 3), np.uint8)
    tiling = Tiling(29, 41, 16, 16, grid=4)
    tops, lefts = (0, 8, 16), (0, 8, 16, 28)
    assert tiling.tiles == tuple(Tile(top, left) for top in tops for left in lefts)
    drawn = np.stack([tiling.cut(picture, tile) for tile in tiling.tiles])
    np.testing.assert_array_equal(tiling.join(drawn), picture)


@pytest.mark.parametrize("side", [2, 4, 16])
def test_noise_of_latents_lies_as_their_tiles_do(side: int) -> None:
    shape, half = (1, 2, side, side), side // 2
    elsewhere, above, part = (noise(7, Tile(*at)).normal(shape) for at in ((0, 0), (0, 8), (4, 12)))
    assert part.shape == shape
    np.testing.assert_array_equal(part[..., :half, :half], above[..., half:, half:])
    assert not np.isin(part, elsewhere).any()
