"""Prompts to prompt_embeds, with a memory of the last ones; a guidance scale to timestep_cond."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from sd_runtime.arrays import copy_into
from sd_runtime.prompt_weighting import weigh, weighted_parts
from sd_runtime.tokenizer import Chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from sd_engines.engine import Array, Engine
    from sd_runtime.timing import Timings
    from sd_runtime.tokenizer import Tokenizer


class PromptEncoder:
    """Encodes each chunk of a text on its own row, so that it never depends on its neighbours.

    The last ``capacity`` chunks' embeddings are kept (77 × 768 float32 is 231 KiB): the negative
    prompt of a service is encoded once, not once a request. ``max_chunks`` is how many of them the
    UNet takes at once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text_encoder: Engine,
        *,
        max_chunks: int = 1,
        capacity: int = 64,
    ) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._max_chunks = max_chunks
        self._capacity = capacity
        self._known: OrderedDict[bytes, Array] = OrderedDict()

    def encode(
        self,
        groups: Sequence[tuple[str, ...]],
        *,
        prompt_weighting: bool = False,
        timings: Timings,
    ) -> dict[tuple[str, ...], tuple[Array, ...]]:
        """Group of texts → prompt_embeds float32 [max_chunks · 77, d], on the engine's device.

        A group is what one picture's UNet sees at once: its shorter texts are padded to as many
        chunks as its longest. Where that is fewer than ``max_chunks``, all are repeated, which
        attention does not notice; a number that does not divide ``max_chunks`` is padded to the
        next that does. With ``prompt_weighting`` the texts are those of `weighted_parts`.
        """
        embeds = {}
        for texts in dict.fromkeys(groups):
            with timings.measure("tokenize"):
                prompts = [
                    self._tokenizer.chunks(
                        weighted_parts(text) if prompt_weighting else [(text, 1.0)],
                        max_chunks=self._max_chunks,
                    )
                    for text in texts
                ]
                longest = max(len(prompt.input_ids) for prompt in prompts)
                count = next(
                    n for n in range(longest, 1 + self._max_chunks) if not self._max_chunks % n
                )
                prompts = [self._padded(prompt, count) for prompt in prompts]
            embeds[texts] = tuple(self._embeds(prompt, timings=timings) for prompt in prompts)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return embeds

    def _padded(self, prompt: Chunks, count: int) -> Chunks:
        """``prompt`` with chunks of no words until there are ``count``."""
        missing = count - len(prompt.input_ids)
        if not missing:
            return prompt
        empty = self._tokenizer.chunks([("", 1.0)])
        return Chunks(
            *(np.concatenate([a, *[b] * missing]) for a, b in zip(prompt, empty, strict=True))
        )

    def _embeds(self, prompt: Chunks, *, timings: Timings) -> Array:
        chunks = [self._chunk_embeds(ids, timings=timings) for ids in prompt.input_ids]
        if self._max_chunks == 1 and (prompt.weights == 1).all():
            return chunks[0]
        length = len(chunks[0])
        embeds = _empty_like(chunks[0], self._max_chunks * length)
        used = embeds[: len(chunks) * length]
        for first, chunk in zip(range(0, len(used), length), chunks, strict=True):
            used[first : first + length] = chunk
        if (prompt.weights != 1).any():
            weights = _empty_like(used[:, 0], len(used))
            copy_into(weights, prompt.weights.reshape(-1))
            weigh(used, weights)
        for first in range(len(used), len(embeds), len(used)):
            embeds[first : first + len(used)] = used
        return embeds

    def _chunk_embeds(self, input_ids: NDArray[np.int64], *, timings: Timings) -> Array:
        """prompt_embeds float32 [77, d] of one chunk, not to be changed."""
        key = input_ids.tobytes()
        if key not in self._known:
            with timings.measure("text_encoder"):
                binding = self._text_encoder.bind(1)
                copy_into(binding.inputs["input_ids"], input_ids[None])
                binding.run()
                self._known[key] = binding.outputs["prompt_embeds"][0].copy()
        self._known.move_to_end(key)
        return self._known[key]

    def forget(self) -> None:
        """Drop every embedding that is kept."""
        self._known.clear()


def guidance_scale_embedding(guidance_scale: float, width: int) -> NDArray[np.float32]:
    """What a UNet distilled with its guidance is told of it, float32 [width].

    Sines, then cosines of 1000·(guidance_scale − 1) at falling frequencies, as a timestep's
    (Meng et al. 2022, arXiv:2210.03142; Luo et al. 2023, arXiv:2310.04378). The angles go up to
    thousands, so float32 shows: rounded to it where diffusers rounds, and nowhere else.
    """
    half = width // 2
    step = np.log(np.float32(10000)) / np.float32(half - 1)
    exponents = np.arange(half, dtype=np.float32) * -step
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    scale = np.float32(guidance_scale - 1) * np.float32(1000)
    angles = (scale * frequencies).astype(np.float64)
    embedding = np.zeros(width, np.float32)  # an odd width ends in a zero
    embedding[:half] = np.sin(angles)
    embedding[half : 2 * half] = np.cos(angles)
    return embedding


def _empty_like(array: Array, length: int) -> Array:
    """``length`` rows like those of ``array``, where it lives."""
    return np.empty_like(array, shape=(length, *array.shape[1:]))
