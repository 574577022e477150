"""Pictures as people have them: turned, see-through, of 16 bits, moving, or no pictures at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import Image

from sd_engines.errors import ConfigError
from sd_runtime import Request
from sd_runtime.image import read_recipe_text
from sd_runtime.input_image import InputImage, readable

if TYPE_CHECKING:
    from pathlib import Path

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def of(source: object) -> InputImage:
    return InputImage.of(source, name="image")


def saved(folder: Path, image: Image.Image, name: str = "a.png", **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def test_every_way_to_give_a_picture_gives_the_same(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    path = saved(tmp_path, image)
    given = [of(source) for source in (PIXELS, image, path, str(path), of(image))]
    assert len(set(given)) == 1
    assert given[2].name == str(path)
    for one in given:
        np.testing.assert_array_equal(one.pixels(6, 8), PIXELS)
    assert of(saved(tmp_path, image, "b.webp", lossless=True)) == given[0]
    assert of(PIXELS.reshape(8, 6, 3)) != given[0]
    assert of(PIXELS[..., 0]) == of(PIXELS[..., :1])
    two = image.convert("1")
    assert of(two) != of(two.convert("RGB")), "as masks they are resized differently"
    assert Request("a", image=path) == Request("a", image=PIXELS)
    assert Request("a", image=path) != Request("a", image=255 - PIXELS)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "RGB"])
@pytest.mark.parametrize("size", [(3, 4), (12, 16)])
def test_a_picture_that_is_fitted_is_the_same_at_that_size(
    mode: str, size: tuple[int, int]
) -> None:
    image = of(Image.fromarray(PIXELS).convert(mode))
    fitted, mask = image.fitted(*size), image.fitted_mask(*size)
    assert fitted == mask == image
    assert fitted.image.size == mask.image.size == size[::-1]
    np.testing.assert_array_equal(fitted.pixels(*size), image.pixels(*size))
    np.testing.assert_array_equal(mask.mask(*size), image.mask(*size))


@pytest.mark.parametrize(
    ("mode", "start"), [("RGB", "e605a6db4b3d6d78"), ("1", "aa337f5cea9e3423")]
)
def test_old_recipes_know_their_picture(mode: str, start: str) -> None:
    picture = Image.linear_gradient("L").resize((20, 600), Image.Resampling.NEAREST)
    assert of(picture.convert(mode)).sha256.startswith(start)


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[..., 0]])
def test_a_picture_stays_as_it_was_given(pixels: np.ndarray) -> None:
    changed_later = pixels.copy()
    given = of(changed_later)
    changed_later[...] = 0
    np.testing.assert_array_equal(given.pixels(6, 8), of(pixels).pixels(6, 8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_put_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(PIXELS), exif=exif)
    upright = np.asarray(load_image(str(path)))
    np.testing.assert_array_equal(of(path).pixels(*upright.shape[:2]), upright)
    with Image.open(path) as image:
        assert of(image) == of(path)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "PA", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert("P" if mode == "PA" else mode).convert(mode)
    np.testing.assert_array_equal(of(image).pixels(6, 8), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_see_through_parts_are_refused(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    image.putalpha(Image.fromarray(PIXELS[..., 0]))
    with pytest.raises(ConfigError, match="see-through") as caught:
        of(image)
    assert "background" in caught.value.hint


def test_a_transparent_colour_is_refused_where_it_is_used(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS).quantize(4)
    with pytest.raises(ConfigError, match="see-through"):
        of(saved(tmp_path, image, "a.gif", transparency=0))
    of(saved(tmp_path, image, "b.gif"))


def test_16_bits_are_rounded_to_8(tmp_path: Path) -> None:
    deep = np.arange(0, 65536, 1366, dtype=np.uint16).reshape(6, 8)
    path = saved(tmp_path, Image.fromarray(deep))
    with Image.open(path) as image:
        assert image.mode == "I;16"
    expected = np.round(deep / 257)
    np.testing.assert_array_equal(of(path).pixels(6, 8), np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tiff", "a.png"])
def test_a_moving_picture_is_refused(tmp_path: Path, name: str) -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
    with pytest.raises(ConfigError, match="has 2 frames") as caught:
        of(path)
    assert caught.value.hint


def test_a_camera_jpeg_with_previews_is_one_picture(tmp_path: Path) -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    path = saved(tmp_path, frames[0], "a.mpo", save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert of(path) == of(saved(tmp_path, frames[0], "a.jpg"))


def test_another_shape_is_stretched_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    image = of(PIXELS)
    assert image.pixels(12, 16).shape == (12, 16, 3)
    assert image.mask(9, 12).shape == (9, 12)
    assert caplog.text == ""
    assert image.pixels(8, 8).shape == (8, 8, 3)
    assert "image is 6×8 (height × width) and is stretched to 8×8" in caplog.text


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.png", "cannot read the picture .*missing.png"),
        ("empty.png", "cannot read the picture"),
        ("text.png", "cannot read the picture"),
        ("cut.png", "cannot read the picture"),
        (".", "cannot read the picture"),
        (7, "image is no picture but int"),
        (b"bytes", "no picture but bytes"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"shape \(1, 4, 4, 3\)"),
        (np.zeros((4, 4, 3), np.float32), "an array of float32"),
        (Image.new("F", (4, 4)), "no known range"),
        (Image.new("I", (4, 4)), "no known range"),
        (Image.new("RGB", (0, 4)), "0×4"),
    ],
    ids=range(14),
)
def test_what_is_no_picture_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: object, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    whole = saved(tmp_path, Image.fromarray(PIXELS.repeat(50, axis=0))).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=words) as caught:
        Request("a cat", image=source)
    assert caught.value.hint


def test_how_to_give_an_array_depends_on_its_numbers() -> None:
    with pytest.raises(ConfigError, match="an array of int64") as caught:
        of(PIXELS.astype(np.int64))
    assert "array.astype('uint8') of such numbers" in caught.value.hint
    assert "(255 * array).astype('uint8') of those from 0 to 1" in caught.value.hint


def test_a_picture_as_large_as_a_field_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ConfigError, match="48 pixels"):
        of(saved(tmp_path, Image.fromarray(PIXELS)))


@pytest.mark.parametrize("error", [TypeError("Missing dimensions"), RuntimeError("no frame")])
def test_whatever_a_decoder_raises_is_of_the_picture(error: Exception) -> None:
    words = rf"cannot read the picture a\.tif: {error}"
    with pytest.raises(ConfigError, match=words), readable("a.tif"):
        raise error


def test_a_recipe_in_a_picture_as_large_as_a_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ConfigError, match="decompression bomb"):
        read_recipe_text(tmp_path / "a.png")
