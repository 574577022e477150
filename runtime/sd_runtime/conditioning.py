"""Prompts to prompt_embeds, with a memory of the last ones; a guidance scale to timestep_cond."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from sd_runtime.arrays import copy_into

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from sd_engines.engine import Array, Engine
    from sd_runtime.timing import Timings
    from sd_runtime.tokenizer import Tokenizer


class PromptEncoder:
    """Encodes each text on its own row, so that its embedding never depends on its neighbours.

    The last ``capacity`` embeddings are kept (77 × 768 float32 is 231 KiB): the negative prompt
    of a service is encoded once, not once a request.
    """

    def __init__(self, tokenizer: Tokenizer, text_encoder: Engine, *, capacity: int = 64) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._capacity = capacity
        self._known: OrderedDict[str, Array] = OrderedDict()

    def encode(self, texts: Sequence[str], *, timings: Timings) -> dict[str, Array]:
        """Text → prompt_embeds float32 [tokens, d], on the engine's device."""
        wanted = list(dict.fromkeys(texts))
        missing = [text for text in wanted if text not in self._known]
        embeds = {text: self._known[text] for text in wanted if text in self._known}
        if missing:
            with timings.measure("tokenize"):
                input_ids = self._tokenizer.encode(missing)
            binding = self._text_encoder.bind(1)
            for text, ids in zip(missing, input_ids, strict=True):
                with timings.measure("text_encoder"):
                    copy_into(binding.inputs["input_ids"], ids[None])
                    binding.run()
                    embeds[text] = binding.outputs["prompt_embeds"][0].copy()
        for text in wanted:
            self._known[text] = embeds[text]
            self._known.move_to_end(text)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return embeds

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
