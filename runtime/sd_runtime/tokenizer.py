"""Prompts to CLIP token ids, from ``tokenizer.json`` alone.

The ids are those of transformers' CLIPTokenizer with ``padding="max_length", truncation=True``,
which is what diffusers' v1 pipeline asks for. A word of textual inversion with several vectors has
the tokens ``word``, ``word_1``, ``word_2`` … and stands for all of them, as in diffusers.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from sd_engines.errors import BundleError
from sd_engines.node import REMAKE_HINT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import tokenizers
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)
END_OF_TEXT = "<|endoftext|>"


class Chunks(NamedTuple):
    """A prompt in chunks of the text encoder's length, each with its start, end and padding.

    ``input_ids`` int64 and ``weights`` float32, both [chunks, max_tokens].
    """

    input_ids: NDArray[np.int64]
    weights: NDArray[np.float32]


class Tokenizer:
    """Byte-pair encoding with start and end tokens, padded and truncated to one length."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, max_tokens: int, pad_id: int) -> None:
        """``tokenizer`` neither pads nor truncates."""
        self._tokenizer = tokenizer
        self._start, self._end = tokenizer.encode("").ids
        self._pad = pad_id
        self._vectors = _vectors_of_words(tokenizer)
        self.max_tokens = max_tokens

    @classmethod
    def load(cls, path: Path, *, max_tokens: int) -> Self:
        """Read ``tokenizer.json``; its padding token is kept, its lengths are not.

        Without padding settings in the file the pad token is v1's, ``<|endoftext|>``. Raises
        `BundleError` when the file is absent or no tokenizer.
        """
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the Rust side raises bare Exception
            raise BundleError(
                f"{path} cannot be read as a tokenizer: {error}", REMAKE_HINT
            ) from error
        pad_token = (tokenizer.padding or {}).get("pad_token", END_OF_TEXT)
        pad_id = tokenizer.token_to_id(pad_token)
        if pad_id is None:
            raise BundleError(
                f"{path} pads with {pad_token!r}, which it does not know", REMAKE_HINT
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if len(tokenizer.encode("").ids) != 2:
            raise BundleError(f"{path} does not begin and end a prompt as CLIP's does", REMAKE_HINT)
        return cls(tokenizer, max_tokens=max_tokens, pad_id=pad_id)

    def chunks(self, parts: Sequence[tuple[str, float]], *, max_chunks: int = 1) -> Chunks:
        """One prompt, of parts and their weights, in as many chunks as it needs, 1 at least.

        What does not fit in ``max_chunks`` is cut off and named in a log warning. Start, end and
        padding weigh 1.
        """
        text = ""
        ids: list[int] = []
        weights: list[float] = []
        ends: list[int] = []  # where each token's text ends
        for part, weight in parts:
            encoding = self._tokenizer.encode(part, add_special_tokens=False)
            for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
                vectors = self._vectors.get(token, (token,))
                ids += vectors
                weights += [weight] * len(vectors)
                ends += [len(text) + end] * len(vectors)
            text += part
        room = self.max_tokens - 2
        if len(ids) > room * max_chunks:
            logger.warning(
                "A text is longer than %d tokens; this part of it was ignored: %s",
                room * max_chunks + 2,
                text[ends[room * max_chunks - 1] :].strip(),
            )
        used = min(len(ids), room * max_chunks)
        count = max(1, -(-used // room))
        rows = np.full((count, self.max_tokens), self._pad, np.int64)
        scales = np.ones((count, self.max_tokens), np.float32)
        for row, scale, first in zip(rows, scales, range(0, room * count, room), strict=True):
            inside = ids[first : min(first + room, used)]
            row[0], row[1 + len(inside)] = self._start, self._end
            row[1 : 1 + len(inside)] = inside
            scale[1 : 1 + len(inside)] = weights[first : first + len(inside)]
        return Chunks(rows, scales)


def _vectors_of_words(tokenizer: tokenizers.Tokenizer) -> dict[int, tuple[int, ...]]:
    """Token → all that it stands for, where it is a word of several vectors."""
    added = tokenizer.get_added_tokens_decoder()
    ids = {token.content: number for number, token in added.items()}
    found = {}
    for word, number in ids.items():
        vectors = [number]
        while (following := ids.get(f"{word}_{len(vectors)}")) is not None:
            vectors.append(following)
        if len(vectors) > 1:
            found[number] = tuple(vectors)
    return found
