"""Prompts to CLIP token ids, from ``tokenizer.json`` alone.

The ids are those of transformers' CLIPTokenizer with ``padding="max_length", truncation=True``,
which is what diffusers' v1 pipeline asks for.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Self

import numpy as np

from sd_engines.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import tokenizers
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Byte-pair encoding with start and end tokens, padded and truncated to one length."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens

    @classmethod
    def load(cls, path: Path, *, max_tokens: int) -> Self:
        """Read ``tokenizer.json``; its padding token is kept, its lengths are not.

        Without padding settings in the file the pad token is v1's, ``<|endoftext|>``. Raises
        `BundleError` when the file is absent or no tokenizer.
        """
        import tokenizers

        hint = "Make the bundle again: sd-export --model MODEL --output BUNDLE."
        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the Rust side raises bare Exception
            raise BundleError(f"{path} cannot be read as a tokenizer: {error}", hint) from error
        padding = tokenizer.padding or {}
        pad_token = padding.get("pad_token", END_OF_TEXT)
        pad_id = tokenizer.token_to_id(pad_token)
        if pad_id is None:
            raise BundleError(f"{path} pads with {pad_token!r}, which it does not know", hint)
        tokenizer.enable_padding(
            direction=padding.get("direction", "right"),
            pad_id=pad_id,
            pad_token=pad_token,
            length=max_tokens,
        )
        tokenizer.enable_truncation(max_length=max_tokens)
        return cls(tokenizer, max_tokens=max_tokens)

    def encode(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids int64 [len(prompts), max_tokens].

        What does not fit is cut off at the end, as CLIP must, and named in a log warning.
        """
        encodings = self._tokenizer.encode_batch(list(prompts))
        for prompt, encoding in zip(prompts, encodings, strict=True):
            if encoding.overflowing:
                kept = max(end for _, end in encoding.offsets)
                logger.warning(
                    "The prompt is longer than %d tokens; this part of it was ignored: %s",
                    self.max_tokens,
                    prompt[kept:].strip(),
                )
        return np.array([encoding.ids for encoding in encodings], dtype=np.int64)
