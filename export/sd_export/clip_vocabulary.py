"""CLIP's own vocabulary, for checkpoints of one file, which bring no tokenizer."""

from __future__ import annotations

import lzma
from importlib import resources


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's own vocabulary and merges, which all of Stable Diffusion v1 and v2 share."""
    packed = resources.files("sd_export").joinpath("configs/clip_merges.txt.xz").read_bytes()
    lines = lzma.decompress(packed).decode("utf-8").splitlines()
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = len(set(range(256)) - set(kept))
    alphabet = [chr(byte) for byte in kept] + [chr(256 + n) for n in range(others)]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges
