"""Picture files: pixels, the recipe inside them, and that they appear whole or not at all."""

from __future__ import annotations

import io
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_engines.errors import ConfigError, SdError
from sd_runtime.files import check_writable, output_paths, write_files
from sd_runtime.image import (
    check_room,
    encode_image,
    format_of,
    grid_of,
    read_parameters,
    read_recipe_text,
)

RECIPE = '{"prompt": "a \\"<red>\\" & \\u00e9 \\ud83e\\udd8a ]]>"}'
PARAMETERS = 'a "<red>" & é 🦊\x00\x1b\nNegative prompt: b\nSteps: 2'


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_a_picture_carries_its_recipe(tmp_path: Path, pixels: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    format_ = format_of(path)
    path.write_bytes(encode_image(pixels, format_, parameters=PARAMETERS, recipe=RECIPE))
    assert read_recipe_text(path) == RECIPE
    with Image.open(path) as image:
        assert image.format == format_
        assert image.size == (24, 16)
        if format_ == "PNG":
            assert image.info["parameters"] == PARAMETERS
        else:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment[:8] == b"UNICODE\0"
            assert comment[8:].decode("utf-16-be") == PARAMETERS
        if format_ != "JPEG":
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels)


@pytest.mark.parametrize("format_", ["JPEG", "WEBP", "PNG"])
def test_a_recipe_of_ten_thousand_characters(
    tmp_path: Path, pixels: np.ndarray, format_: str
) -> None:
    recipe, path = '"' + "\\ud83e" * 10_000 + '"', tmp_path / "picture"
    path.write_bytes(encode_image(pixels, format_, parameters="é" * 10_000, recipe=recipe))
    assert read_recipe_text(path) == recipe


@pytest.mark.parametrize("texts", [{"parameters": "x" * 40_000}, {"recipe": "x" * 70_000}])
def test_what_jpeg_cannot_hold_is_refused(pixels: np.ndarray, texts: dict[str, str]) -> None:
    for refused in (
        lambda: encode_image(pixels, "JPEG", **texts),
        lambda: check_room("a.jpg", "JPEG", (16, 24), **texts),
    ):
        with pytest.raises(ConfigError, match=r"recipe is [78]\d+ bytes long") as error:
            refused()
        assert ".png" in error.value.hint
    for format_ in ("PNG", "WEBP"):
        assert encode_image(pixels, format_, **texts)


def test_a_picture_that_pillow_cannot_write() -> None:
    with pytest.raises(ConfigError, match="cannot be written as a JPEG file"):
        encode_image(np.zeros((0, 8, 3), np.uint8), "JPEG")


def test_unknown_format() -> None:
    with pytest.raises(ConfigError, match="webp"):
        format_of(Path("picture.gif"))


def test_no_recipe(tmp_path: Path, pixels: np.ndarray) -> None:
    plain, text = tmp_path / "plain.png", tmp_path / "text.png"
    Image.fromarray(pixels).save(plain)
    text.write_text("hello")
    with pytest.raises(ConfigError, match="carries no recipe"):
        read_recipe_text(plain)
    for path in (text, tmp_path / "missing.png", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the picture"):
            read_recipe_text(path)
    whole = encode_image(pixels, "PNG", recipe=RECIPE)
    plain.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot read the picture"):
        read_recipe_text(plain)


def test_a_comment_that_is_not_in_unicode_is_not_read_as_if_it_were() -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + b"a camera's words"
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=exif)
    assert read_parameters(buffer.getvalue()) == ""


def test_grid(pixels: np.ndarray) -> None:
    grid = grid_of([pixels, pixels // 2, pixels // 3], columns=2)
    assert grid.shape == (32, 48, 3)
    np.testing.assert_array_equal(grid[:16, :24], pixels)
    np.testing.assert_array_equal(grid[:16, 24:], pixels // 2)
    np.testing.assert_array_equal(grid[16:, :24], pixels // 3)
    assert (grid[16:, 24:] == 255).all()
    np.testing.assert_array_equal(grid_of([pixels], columns=1), pixels)


def test_nothing_is_replaced_before_all_is_written(tmp_path: Path) -> None:
    write_files({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1", "b": b"2"}
    with pytest.raises(SdError, match="cannot write"):
        write_files({tmp_path / "a": b"3", tmp_path / "missing" / "b": b"4"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1", "b": b"2"}


def test_what_cannot_be_put_in_its_place_costs_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"0")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(SdError, match=r"cannot write .*b\.png: "):
        write_files({tmp_path / "a.png": b"1", tmp_path / "b.png": b"2"})
    assert (tmp_path / "a.png").read_bytes() == b"1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk: the same write, the same kind of refusal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SdError, match=r"cannot write .*b\.png: .*\n.*what it was before"):
            write_files({tmp_path / "a.png": b"1", tmp_path / "b.png": b"2" * 2000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    class Interrupting(dict[Path, bytes]):
        def items(self):
            yield tmp_path / "a", b"1"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_files(Interrupting())
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.png")
    with pytest.raises(ConfigError, match="mkdir"):
        check_writable(tmp_path / "missing" / "new.png")
    with pytest.raises(ConfigError, match="is a folder"):
        check_writable(tmp_path)


def test_names_of_several_pictures() -> None:
    assert output_paths("a.png", [7]) == [Path("a.png")]
    assert output_paths("d/a.b.png", [7, 8]) == [Path("d/a.b-0.png"), Path("d/a.b-1.png")]
    assert output_paths("a.png", range(11))[10] == Path("a-10.png")
    assert output_paths("a.png", range(11))[2] == Path("a-02.png")
    assert output_paths("{seed}-{index:03}.png", [7]) == [Path("7-000.png")]
    with pytest.raises(ConfigError, match="names two pictures alike"):
        output_paths("{seed}.png", [7, 7])
    assert output_paths("{{{index}}}.png", [7]) == [Path("{0}.png")]
    wrong = ("{number}.png", "{.png", "{}.png", "{index.x}.png", "{index:q}.png", "{index[0]}.png")
    for template in (*wrong, "{seed.__class__}.png", "{index:99999999}.png", "{index!r}.png"):
        with pytest.raises(ConfigError, match="cannot be filled in"):
            output_paths(template, [7])


def test_png_is_a_plain_png(pixels: np.ndarray) -> None:
    data = encode_image(pixels, "PNG", parameters="a cat", recipe='{"seed": 7}')
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert image.info == {"parameters": "a cat", "sd-toolkit": '{"seed": 7}'}


@pytest.mark.parametrize(("name", "side"), [("a.webp", 16_384), ("a.jpg", 65_501)])
def test_a_picture_too_large_for_its_format(name: str, side: int) -> None:
    format_ = format_of(Path(name))
    check_room(name, format_, (side - 1, side - 1))
    check_room("a.png", "PNG", (side, side))
    for height, width in ((1, side), (side, 1)):
        with pytest.raises(ConfigError, match=rf"{name}: {width}×{height} pixels, and") as error:
            check_room(name, format_, (height, width))
        assert ".png" in error.value.hint
    with pytest.raises(ConfigError, match=f" file: {side}×1 pixels"):
        encode_image(np.zeros((1, side, 3), np.uint8), format_)
