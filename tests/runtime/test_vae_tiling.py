"""A VAE that sees large pictures by tiles, against diffusers' VAE on the same tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sd_engines.bundle import open_bundle
from sd_engines.errors import ConfigError
from sd_export import export
from sd_export.tiled_vae import work_in_tiles
from sd_runtime import Pipeline, Request
from tiny_upscaler import make_upscaler

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEIGHT, WIDTH, TILE = 24, 16, 8
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
PICTURE = np.stack([ROWS * 9, COLUMNS * 15, 255 - ROWS * 7], axis=-1).astype(np.uint8)
REQUEST = Request("a cat", seed=5, num_inference_steps=3, height=HEIGHT, width=WIDTH)
SMALL = Request("a cat", seed=5, num_inference_steps=3)
IMAGE = Request("a cat", seed=5, num_inference_steps=4, image=PICTURE, height=HEIGHT, width=WIDTH)


@pytest.fixture(scope="module")
def pipeline(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """8×8 pictures, which are one tile, and 24×16; one VAE for both."""
    bundle = tmp_path_factory.mktemp("tiling") / "bundle"
    export(smallest, bundle, sizes=[(HEIGHT, WIDTH)], vae_tiling=True)
    with Pipeline.load(bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def oracle(smallest: Path) -> Any:
    import diffusers

    oracle = diffusers.StableDiffusionPipeline.from_pretrained(smallest)
    work_in_tiles(oracle.vae, TILE, TILE)
    return oracle


def test_one_vae_is_for_all_sizes(pipeline: Pipeline) -> None:
    own, other = open_bundle(pipeline.bundle.path).manifest.all_sizes
    for name in ("vae_decoder", "vae_encoder"):
        assert other.components[name] == own.components[name]
    assert other.components["unet"] != own.components["unet"]
    assert other.certificate[-1].component == "end_to_end"
    assert other.certificate[-1].figure >= 0.999


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers, of numpy
def test_a_picture_is_seen_by_tiles(pipeline: Pipeline, oracle: Any) -> None:
    import diffusers
    import torch

    img2img = diffusers.StableDiffusionImg2ImgPipeline(
        **oracle.components, requires_safety_checker=False
    )
    expected = img2img(
        IMAGE.prompt,
        image=IMAGE.image.image if IMAGE.image else None,
        generator=torch.Generator("cpu").manual_seed(5),
        num_inference_steps=4,
        output_type="np",
    ).images
    drawn = pipeline.generate(IMAGE).pixels.astype(int)
    assert drawn.shape == (1, HEIGHT, WIDTH, 3)
    assert (np.abs(drawn - np.round(expected * 255)) <= 1).mean() >= 0.999


def test_tiles_are_seen_and_mixed(pipeline: Pipeline) -> None:
    """In a corner one tile counts alone: what the decoder gives for it, and for nothing more."""
    result = pipeline.generate(REQUEST)
    corner = result.latents[:, :, :TILE, :TILE]
    decoder = pipeline._engines["vae_decoder"]
    alone = np.round(decoder(latents=corner)["images"] * 255)
    assert np.array_equal(result.pixels[:, 0, 0], alone[:, 0, 0])
    assert not np.array_equal(result.pixels[:, :TILE, :TILE], alone)


def test_a_picture_of_one_tile_is_drawn_as_ever(pipeline: Pipeline, sizes_bundle: Path) -> None:
    with Pipeline.load(sizes_bundle, backend="onnxruntime", threads=1) as other:
        assert np.array_equal(other.generate(SMALL).pixels, pipeline.generate(SMALL).pixels)


def test_an_upscaler_has_tiles_of_its_own(tmp_path: Path) -> None:
    checkpoint = make_upscaler(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="--vae-tiling is not for upscalers"):
        export(checkpoint, tmp_path / "bundle", vae_tiling=True)
    assert not (tmp_path / "bundle").exists()
