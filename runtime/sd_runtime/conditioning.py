"""What a UNet is told besides the latents: of prompts, of its guidance, of the picture's size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from sd_engines.spec import POOLED_PROMPT_EMBEDS
from sd_runtime.arrays import copy_into
from sd_runtime.prompt_weighting import weigh, weighted_parts
from sd_runtime.recent import Recent
from sd_runtime.tokenizer import Chunks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from sd_engines.engine import Array, Engine
    from sd_engines.spec import Profile
    from sd_runtime.timing import Timings
    from sd_runtime.tokenizer import Tokenizer

Texts: TypeAlias = "tuple[str | None, ...]"
"""What one picture's UNet sees at once, as `Plan.texts` says; None is zeros."""
Encoded: TypeAlias = "Mapping[Texts, tuple[PromptEmbeds, ...]]"
"""What was made of the texts of some pictures."""
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""What diffusers tells a refiner of the picture to draw, and of the one not to."""


@dataclass(frozen=True)
class PromptEmbeds:
    """One text, encoded: float32 [tokens, d], and [e] where the model pools it too."""

    prompt_embeds: Array
    pooled_prompt_embeds: Array | None = None

    def zeros(self) -> PromptEmbeds:
        """Zeros in the place of an encoded text."""
        pooled = self.pooled_prompt_embeds
        return PromptEmbeds(
            np.zeros_like(self.prompt_embeds), None if pooled is None else np.zeros_like(pooled)
        )


class PromptEncoder:
    """Encodes each chunk of a text on its own row, so that it never depends on its neighbours.

    ``encoders`` are one or two text encoders by name, each with its tokenizer; what they make of a
    text lies side by side, and the last one pools it, from its first chunk. The last 64 chunks'
    embeddings are kept (77 × 768 float32 is 231 KiB): the negative prompt of a service is encoded
    once, not once a request. ``max_chunks`` is how many of them the UNet takes at once.
    Where parts of a text weigh more than others, each encoder's embeddings keep their mean: that
    of the whole text, or with ``chunk_means`` each chunk's own (`sd_runtime.prompt_weighting`).
    """

    def __init__(
        self,
        encoders: Mapping[str, tuple[Tokenizer, Engine]],
        *,
        max_chunks: int = 1,
        chunk_means: bool = False,
    ) -> None:
        self._encoders = dict(encoders)
        self._max_chunks = max_chunks
        self._chunk_means = chunk_means
        self._known: Recent[tuple[str, bytes], PromptEmbeds] = Recent(64)

    def encode(
        self,
        groups: Sequence[Texts],
        *,
        prompt_weighting: bool = False,
        timings: Timings,
    ) -> Encoded:
        """Group of texts → their embeddings [max_chunks · 77, d], on the engine's device.

        The shorter texts of a group are padded to as many chunks as its longest. Where that is
        fewer than ``max_chunks``, all are repeated, which attention does not notice; a number that
        does not divide ``max_chunks`` is padded to the next that does. With ``prompt_weighting``
        the texts are those of `weighted_parts`. One of a group at least is not None.
        """
        embeds = {}
        for group in dict.fromkeys(groups):
            texts = [text for text in group if text is not None]
            with timings.measure("tokenize"):
                prompts = self._chunks(texts, prompt_weighting=prompt_weighting)
            parts = (
                [self._embeds(name, prompts[name][i], timings=timings) for name in self._encoders]
                for i in range(len(texts))
            )
            found = dict(zip(texts, map(_side_by_side, parts), strict=True))
            embeds[group] = tuple(
                found[texts[0]].zeros() if text is None else found[text] for text in group
            )
        self._known.trim()
        return embeds

    def _chunks(self, texts: Sequence[str], *, prompt_weighting: bool) -> dict[str, list[Chunks]]:
        """Encoder → its chunks of each of ``texts``, as many of each and of every encoder's.

        Tokenizers differ by the vectors of what they were taught (textual inversion).
        """
        parts = [weighted_parts(text) if prompt_weighting else ((text, 1.0),) for text in texts]
        prompts = {
            name: [tokenizer.chunks(part, max_chunks=self._max_chunks) for part in parts]
            for name, (tokenizer, _) in self._encoders.items()
        }
        longest = max(len(prompt.input_ids) for found in prompts.values() for prompt in found)
        count = next(n for n in range(longest, 1 + self._max_chunks) if not self._max_chunks % n)
        return {
            name: [_padded(self._encoders[name][0], prompt, count) for prompt in found]
            for name, found in prompts.items()
        }

    def _embeds(self, name: str, prompt: Chunks, *, timings: Timings) -> PromptEmbeds:
        found = [
            self._known.get((name, ids.tobytes()), partial(self._chunk_embeds, name, ids, timings))
            for ids in prompt.input_ids
        ]
        if self._max_chunks == 1 and (prompt.weights == 1).all():
            return found[0]
        chunks = [chunk.prompt_embeds for chunk in found]
        length = len(chunks[0])
        embeds = _empty_like(chunks[0], self._max_chunks * length)
        used = embeds[: len(chunks) * length]
        for first, chunk in zip(range(0, len(used), length), chunks, strict=True):
            used[first : first + length] = chunk
        if (prompt.weights != 1).any():
            weights = _empty_like(used[:, 0], len(used))
            copy_into(weights, prompt.weights.reshape(-1))
            span = length if self._chunk_means else len(used)
            for first in range(0, len(used), span):
                weigh(used[first : first + span], weights[first : first + span])
        for first in range(len(used), len(embeds), len(used)):
            embeds[first : first + len(used)] = used
        return PromptEmbeds(embeds, found[0].pooled_prompt_embeds)

    def _chunk_embeds(
        self, name: str, input_ids: NDArray[np.int64], timings: Timings
    ) -> PromptEmbeds:
        """What the encoder ``name`` makes of one chunk, not to be changed."""
        with timings.measure(name):
            binding = self._encoders[name][1].bind(1)
            copy_into(binding.inputs["input_ids"], input_ids[None])
            binding.run()
            outputs = {output: array[0].copy() for output, array in binding.outputs.items()}
            return PromptEmbeds(**outputs)

    def forget(self) -> None:
        """Drop every embedding that is kept."""
        self._known.clear()


def pooled_inputs(embeds: Sequence[PromptEmbeds]) -> dict[str, list[Array]]:
    """What the UNet takes by name of the pooled ``embeds``, a row each; nothing without them."""
    pooled = [text.pooled_prompt_embeds for text in embeds if text.pooled_prompt_embeds is not None]
    return {POOLED_PROMPT_EMBEDS: pooled} if pooled else {}


def time_ids(
    profile: Profile, *, is_refiner: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What Stable Diffusion XL is told of the picture, and beside a negative prompt: float32 [k].

    Its height and width in pixels, where it was cropped (nowhere), and either its height and width
    again or, to a refiner, how much people liked it (Podell et al. 2023, arXiv:2307.01952,
    section 2.2).
    """
    size = (profile.height, profile.width)
    scores = (AESTHETIC_SCORE,), (NEGATIVE_AESTHETIC_SCORE,)
    ends: tuple[tuple[float, ...], tuple[float, ...]] = scores if is_refiner else (size, size)
    positive, negative = (np.array([*size, 0, 0, *end], np.float32) for end in ends)
    return positive, negative


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


def _padded(tokenizer: Tokenizer, prompt: Chunks, count: int) -> Chunks:
    """``prompt`` with chunks of no words until there are ``count``."""
    missing = count - len(prompt.input_ids)
    if not missing:
        return prompt
    empty = tokenizer.chunks([("", 1.0)])
    return Chunks(
        *(np.concatenate([a, *[b] * missing]) for a, b in zip(prompt, empty, strict=True))
    )


def _side_by_side(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """What several encoders made of one text, as the UNet takes it."""
    if len(parts) == 1:
        return parts[0]
    joined = np.concatenate([part.prompt_embeds for part in parts], axis=-1)
    return PromptEmbeds(joined, parts[-1].pooled_prompt_embeds)


def _empty_like(array: Array, length: int) -> Array:
    """``length`` rows like those of ``array``, where it lives."""
    return np.empty_like(array, shape=(length, *array.shape[1:]))
