"""Textual inversion files of every form, against diffusers' ``load_textual_inversion``."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sd_engines.errors import ConfigError, ExportError, SdError
from sd_export import export
from sd_export.cli import main
from sd_export.embedding import find_embeddings
from sd_runtime import Pipeline, Request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WIDTH = 8
WIDTHS = {"text_encoder": WIDTH}
OF_XL = {"text_encoder": WIDTH, "text_encoder_2": 16}
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a1111(path: Path, tensor: torch.Tensor, *, name: str | None) -> Path:
    """As AUTOMATIC1111's trainer saves it."""
    named = {} if name is None else {"name": name}
    stored = {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, **named, "step": 9}
    torch.save({**stored, "sd_checkpoint": "0b1c", "sd_checkpoint_name": None}, path)
    return path


def test_pictures_are_those_of_diffusers(smallest: Path, tmp_path: Path) -> None:
    one = tmp_path / "learned_embeds.safetensors"
    save_file({"<cat-Toy>": vectors(WIDTH)}, one)
    three = a1111(tmp_path / "style.pt", vectors(3, WIDTH, seed=1).requires_grad_(), name="style")
    two = tmp_path / "learned_embeds.bin"
    torch.save({"<placeholder>": vectors(2, WIDTH, seed=2)}, two)
    bundle = tmp_path / "bundle"
    options = [f"--embedding={path}" for path in (one, three, f"{two}=<bad>")]
    model = ["--model", str(smallest), "--output", str(bundle), "--quiet"]
    model += ["--backend", "onnxruntime"]
    assert main([*model, *options]) == 0
    record = json.loads((bundle / "export.json").read_text())["embeddings"]
    assert [made["tokens"] for made in record] == [
        ["<cat-Toy>"],
        ["style", "style_1", "style_2"],
        ["<bad>", "<bad>_1"],
    ]

    oracle = diffusers.StableDiffusionPipeline.from_pretrained(smallest)
    oracle.set_progress_bar_config(disable=True)
    for path, token in ((one, None), (three, None), (two, "<bad>")):
        oracle.load_textual_inversion(str(tmp_path), weight_name=path.name, token=token)
    with Pipeline.load(bundle, threads=1) as pipeline:
        drawn = []
        for prompt, negative in (
            ("a <cat-toy> in the style of style", "<bad>, dog"),
            ("style,style " + "a " * 66 + "style", "Style_2 <CAT-TOY>"),  # one is cut in its middle
        ):
            result = pipeline.generate(
                Request(prompt, negative_prompt=negative, seed=5, num_inference_steps=2)
            )
            expected = oracle(
                prompt,
                negative_prompt=negative,
                num_inference_steps=2,
                generator=torch.Generator("cpu").manual_seed(5),
            )
            pixels = np.asarray(expected.images[0])
            assert (np.abs(result.pixels[0].astype(int) - pixels) <= 1).mean() >= 0.999
            drawn.append(result.pixels[0])
        plain = pipeline.generate(Request("a in the style of", seed=5, num_inference_steps=2))
    assert not np.array_equal(drawn[0], plain.pixels[0])


@pytest.mark.parametrize(
    ("name", "text", "token"),
    [("a-name", "{}", "a-name"), (None, "{}", "file"), ("a-name", "{}=other", "other")],
)
def test_whose_name_the_token_has(tmp_path: Path, name: str, text: str, token: str) -> None:
    path = a1111(tmp_path / "file.pt", vectors(1, WIDTH), name=name)
    (found,) = find_embeddings([text.format(path)], widths=WIDTHS)
    assert found.tokens == (token,)
    torch.testing.assert_close(found.vectors(), vectors(1, WIDTH))


def save(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path)


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("file", "write", "text", "kind", "words"),
    [
        ("a.safetensors", save({"<a>": vectors(9)}), "{}", ExportError, "9, the .* vectors of 8"),
        ("a.safetensors", save({"<a>": vectors(1, 1, 8)}), "{}", ExportError, "1 × 1 × 8"),
        ("a.safetensors", save({"<a>": vectors(0, 8)}), "{}", ExportError, "0 × 8"),
        ("a.safetensors", save({"<a>": vectors(8) / 0}), "{}", ExportError, "not finite"),
        ("a.safetensors", save({"a": vectors(8), "b": vectors(8)}), "{}", ExportError, "2 tensors"),
        ("a.safetensors", save({"clip_l": vectors(8), "clip_g": vectors(8)}), "{}", ExportError,
         "Stable Diffusion XL"),
        ("a.safetensors", lambda p: p.write_bytes(b"x" * 99), "{}", ExportError, "canno"),
        ("a.bin", lambda p: torch.save({"<a>": Hostile()}, p), "{}", ExportError, "system"),
        ("a.pt", lambda p: p.write_bytes(b"PK" * 9), "{}", ExportError, "was not run"),
        ("a.pt", lambda p: torch.save({"x": 1}, p), "{}", ExportError, "no tensor"),
        ("a.txt", save({"<a>": vectors(8)}), "{}", ConfigError, "not a weight file"),
        ("a.safetensors", save({"<a>": vectors(8)}), "{}=", ConfigError, "is no token"),
        ("a.safetensors", save({"<a>": vectors(8)}), "{}= x", ConfigError, "is no token"),
        ("a.safetensors", save({"<a>": vectors(8)}), "no-{}", ConfigError, "no such file"),
        ("a.safetensors", save({"<a>": vectors(8)}), "{}=!", ConfigError, "a token of the check"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_leaves_nothing_behind(
    smallest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    write: Callable[[Path], None],
    text: str,
    kind: type[SdError],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / file)
    with pytest.raises(kind, match=words) as caught:
        export(smallest, tmp_path / "bundle", embeddings=[text.format(file)])
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_two_embeddings_of_one_token(tmp_path: Path) -> None:
    for name, token, shape in (("a", "<x>", (2, WIDTH)), ("b", "<X>_1", (WIDTH,))):
        save_file({token: vectors(*shape)}, tmp_path / f"{name}.safetensors")
    a, b = (str(tmp_path / f"{name}.safetensors") for name in "ab")
    for texts in ([a, b], [a, a], [b, f"{a}=<X>_1"]):
        with pytest.raises(ConfigError, match="both are for the token"):
            find_embeddings(texts, widths=WIDTHS)
    assert len(find_embeddings([a, f"{b}=<y>"], widths=WIDTHS)) == 2


def test_of_xl_each_encoder_has_its_own(tmp_path: Path) -> None:
    whole, first, second = (tmp_path / f"{name}.safetensors" for name in ("whole", "l", "g"))
    left, right = vectors(2, WIDTH), vectors(2, 16)
    save_file({"clip_l": left, "clip_g": right}, whole)
    save_file({"<cat>": left}, first)
    save_file({"<cat>": right}, second)
    for texts, token in (([f"{whole}"], "whole"), ([f"{first}", f"{second}"], "<cat>")):
        found = find_embeddings(texts, widths=OF_XL)
        assert [e.text_encoder for e in found] == list(OF_XL)
        assert [e.tokens for e in found] == [(token, f"{token}_1")] * 2
        for embedding, wanted in zip(found, (left, right), strict=True):
            torch.testing.assert_close(embedding.vectors(), wanted)
    (found_alone,) = find_embeddings([f"{whole}=<x>"], widths={"text_encoder_2": 16})  # a refiner's
    assert (found_alone.text_encoder, found_alone.tokens) == ("text_encoder_2", ("<x>", "<x>_1"))


@pytest.mark.parametrize(
    ("tensors", "widths", "words"),
    [
        ({"<v1>": vectors(WIDTH)}, OF_XL, "for one text encoder, the checkpoint has 2"),
        ({"clip_g": vectors(16)}, OF_XL, "for one text encoder, the checkpoint has 2"),
        ({"clip_l": vectors(WIDTH), "clip_g": vectors(17)}, OF_XL, "17, the .*_2 takes .* of 16"),
        ({"clip_l": vectors(8), "clip_g": vectors(16), "t5": vectors(8)}, OF_XL, "3 tensors"),
        ({"clip_l": vectors(WIDTH)}, {"text_encoder_2": 16}, "not for the checkpoint's encoder"),
    ],
)
def test_files_that_xl_cannot_use(
    tmp_path: Path, tensors: dict[str, torch.Tensor], widths: dict[str, int], words: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(ExportError, match=words) as caught:
        find_embeddings([str(path)], widths=widths)
    assert caught.value.hint
