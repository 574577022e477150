"""Token ids against transformers' CLIPTokenizer, on CLIP's own vocabulary and on a small one."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer

from sd_engines.errors import BundleError
from sd_runtime.tokenizer import Tokenizer
from tiny import clip_vocabulary, save_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CLIP_VOCABULARY = (
    Path(__file__).parents[3] / "shared" / "data" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
)
MAX_TOKENS = 77
HOSTILE = {
    "empty": "",
    "blank": " \t\r\n\u00a0\u3000 ",
    "plain": "A photograph of an astronaut riding a horse, trending on artstation!!",
    "emoji": "🦊👩‍👩‍👧‍👦🇩🇪 a fox 🏳️‍🌈 ✨",
    "cjk": "一只红色的狐狸 赤い円 붉은 원",
    "combining": "Zalgo\u0301\u0327 e\u0301 \u0041\u030a ﬁ Å ①",
    "right to left": "دائرة حمراء עיגול אדום \u202etest",
    "numbers": "1234567890 3.14159 1e-5 ½ ٣ Ⅷ 1,000,000",
    "contractions": "it's we're I'll don't they've i'd I'm 'S 'T",
    "punctuation": "!!!???...,,,;;;((( [red:0.5] {a|b} <lora:x:1> \\ / \" ' `",
    "special": "a <|endoftext|> b <|startoftext|>c<|endoftext|>",
    "broken special": "< |endoftext|> <|endoftext| > <|ENDOFTEXT|>",
    "case": "RED Red rEd İstanbul ẞ ΣΑΣ",
    "controls": "a\x00b\x07c\x1b[0m\x7f",
    "private": "\ue000\U0010ffff\ufffd\ufeff",
    "one word": "x" * 300,
    "10,000 characters": "a red circle, " * 715,
    "10,000 emoji": "🦊" * 10_000,
    "exactly full": "a " * 75,
    "one too many": "a " * 76,
    "end cut": "a " * 74 + "<|endoftext|> b c",
}


def oracle_ids(oracle: CLIPTokenizer, prompts: list[str]) -> np.ndarray:
    return oracle(
        prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="np"
    ).input_ids


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPTokenizer]:
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("small")
    save_tokenizer(folder, form="tokenizer.json")
    return folder / "tokenizer.json", CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPTokenizer]:
    if not CLIP_VOCABULARY.exists():
        pytest.skip(f"CLIP's vocabulary is not at {CLIP_VOCABULARY}")
    from transformers import CLIPTokenizer

    lines = gzip.decompress(CLIP_VOCABULARY.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    alphabet = list(clip_vocabulary()[0])[:256]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    assert len(vocabulary) == 49408
    oracle = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
    folder = tmp_path_factory.mktemp("clip")
    oracle.save_pretrained(folder)
    return folder / "tokenizer.json", oracle


def ids_of(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    return tokenizer.chunks([(prompt, 1.0)]).input_ids


@pytest.mark.parametrize("vocabulary", ["small", "clip"])
def test_ids_equal_transformers(vocabulary: str, request: pytest.FixtureRequest) -> None:
    path, oracle = request.getfixturevalue(vocabulary)
    tokenizer = Tokenizer.load(path, max_tokens=MAX_TOKENS)
    for name, prompt in HOSTILE.items():
        ids = ids_of(tokenizer, prompt)
        assert ids.dtype == np.int64
        assert ids.shape == (1, MAX_TOKENS)
        np.testing.assert_array_equal(ids, oracle_ids(oracle, [prompt]), err_msg=name)


def test_known_clip_ids(clip: tuple[Path, CLIPTokenizer]) -> None:
    """The ids that OpenAI's own tokenizer gives, so that both sides cannot be wrong alike."""
    ids = ids_of(Tokenizer.load(clip[0], max_tokens=MAX_TOKENS), "a photo of a cat")
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]


def test_padding_of_the_file_is_kept_and_its_lengths_are_not(
    small: tuple[Path, CLIPTokenizer], tmp_path: Path
) -> None:
    raw = RustTokenizer.from_file(str(small[0]))
    pad_id = raw.token_to_id("!")
    raw.enable_padding(pad_id=pad_id, pad_token="!", length=12)  # noqa: S106  as Stable Diffusion 2 pads
    raw.enable_truncation(max_length=12)
    raw.save(str(tmp_path / "tokenizer.json"))
    ids = ids_of(Tokenizer.load(tmp_path / "tokenizer.json", max_tokens=MAX_TOKENS), "a")
    assert ids.shape == (1, MAX_TOKENS)
    assert ids[0, 3:].tolist() == [pad_id] * (MAX_TOKENS - 3)


def test_what_is_cut_off_is_named(
    small: tuple[Path, CLIPTokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer.load(small[0], max_tokens=MAX_TOKENS)
    with caplog.at_level(logging.WARNING):
        ids_of(tokenizer, "a " * 75)
        assert not caplog.records
        ids_of(tokenizer, "a " * 75 + "Red Cat")
    assert "longer than 77 tokens" in caplog.text
    assert caplog.text.rstrip().endswith("Red Cat")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b'{"model": 1}'])
def test_no_tokenizer_is_a_bundle_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match="sd-export"):
        Tokenizer.load(path, max_tokens=MAX_TOKENS)
