r"""Prompts with weights, in AUTOMATIC1111's syntax: which part of a prompt counts how much.

``(word)`` counts 1.1 times, ``[word]`` 1 / 1.1 times, ``(word:1.3)`` 1.3 times; brackets nest and
multiply, one that is never closed reaches to the end, and ``\(`` is a bracket. The embeddings of a
part are multiplied by its weight, then all of the prompt's so that their mean is what it was.

A prompt of one chunk is weighed so by AUTOMATIC1111 and by diffusers' community pipeline
``lpw_stable_diffusion``. Of a longer one v1 and v2 keep the mean of all chunks together, as that
pipeline, and Stable Diffusion XL that of each chunk, as AUTOMATIC1111. Each of XL's encoders keeps
its own, and what is pooled is not weighed. diffusers' ``lpw_stable_diffusion_xl`` is another: it
moves embeddings away from those of a chunk's end by the first tokenizer's weights, keeps no mean,
and pools the last chunk.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    from sd_engines.engine import Array

_MARK = re.compile(
    r"""\\(?P<escaped>[()\[\]\\]?)
    | (?P<opening>[(\[])
    | :\s*(?P<weight>[+-]?[.\d]+)\s*\)
    | (?P<closing>[)\]])""",
    re.VERBOSE,
)
_FACTORS = {"(": 1.1, "[": 1 / 1.1}
_OPENING = {")": "(", "]": "["}
MAX_WEIGHT = 1000.0
"""Far beyond it embeddings are no numbers any more."""


@lru_cache(maxsize=16)  # one request asks several times
def weighted_parts(prompt: str) -> tuple[tuple[str, float], ...]:
    """The prompt without its marks, in parts, each with its weight; neighbours' weights differ.

    `ConfigError` for a weight that is no number, or above `MAX_WEIGHT`.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def add(text: str) -> None:
        if text:  # thousands of brackets in a row are nothing to scale
            texts.append(text)
            weights.append(1.0)

    def scale(first: int, factor: float) -> None:
        weights[first:] = [weight * factor for weight in weights[first:]]

    end = 0
    for mark in _MARK.finditer(prompt):
        add(prompt[end : mark.start()])
        end = mark.end()
        opening, closing = mark["opening"], mark["closing"]
        if opening:
            opened[opening].append(len(texts))
        elif mark["weight"] and opened["("]:
            scale(opened["("].pop(), _number(mark["weight"], prompt))
        elif closing and opened[_OPENING[closing]]:
            scale(opened[_OPENING[closing]].pop(), _FACTORS[_OPENING[closing]])
        else:
            add(mark[0] if mark["escaped"] is None else mark["escaped"])
    add(prompt[end:])
    for kind, places in opened.items():
        for first in places:
            scale(first, _FACTORS[kind])
    parts = [
        ("".join(text for text, _ in alike), weight)
        for weight, alike in groupby(zip(texts, weights, strict=True), key=itemgetter(1))
    ]
    for text, weight in parts:
        if not abs(weight) <= MAX_WEIGHT:  # nor is NaN, as of 0 times infinity
            raise ConfigError(
                f"{text[:200]!r} in the prompt counts {weight:g} times",
                f"Let it count {MAX_WEIGHT:g} times at most; nested brackets multiply.",
            )
    return tuple(parts) or (("", 1.0),)


def weigh(prompt_embeds: Array, weights: Array) -> None:
    """Multiply ``prompt_embeds`` [tokens, d] by ``weights`` [tokens], in place; keep their mean."""
    mean = prompt_embeds.mean()
    prompt_embeds *= weights[:, None]
    prompt_embeds *= mean / prompt_embeds.mean()


def _number(text: str, prompt: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(
            f"the weight {text!r} in the prompt {prompt[:200]!r} is no number",
            r"Write (word:1.3), or \( and \) where brackets are meant.",
        ) from error
