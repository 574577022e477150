"""What a row of the table makes of the latents, by numpy or on a GPU as one kernel.

    newest  = p·sample + q·model_output
    sample' = a·sample + b·newest + Σ weight·array

The sum is over older predictions and the noise. What an inpainted picture keeps is put back then.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from sd_runtime.arrays import elementwise, moved

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sd_engines.engine import Array
    from sd_runtime.table import SchedulerTable

Weighted: TypeAlias = "tuple[Array, float]"


class Known(NamedTuple):
    """What an inpainted picture keeps, float32 [n, c, h, w] each, 0 where it is repainted.

    ``latents`` are those of the picture, ``noise`` is the first; ``repainted`` is 1 where the other
    two are 0, and 0 where they are kept.
    """

    latents: Array
    noise: Array
    repainted: Array


class Factors(NamedTuple):
    """The numbers of a row that every sampler has, and how much its newest prediction counts."""

    p: float
    q: float
    a: float
    b: float


class Update:
    """The latents of n pictures, float32 [n, c, h, w], and how the rows of ``table`` change them.

    ``sample`` is changed in place. ``known`` may live elsewhere.
    """

    def __init__(self, sample: Array, table: SchedulerTable, *, known: Known | None) -> None:
        self._sample = sample
        self._known = None if known is None else Known(*(moved(k, like=sample) for k in known))
        self._history = [np.empty_like(sample) for _ in table.coef_history.T]
        # Python floats keep float32 arrays float32; numpy's float64 scalars would widen them.
        columns = (table.pred_sample, table.pred_output, table.coef_sample, table.coef_history.T[0])
        self._factors = [Factors(*row) for row in np.transpose(columns).tolist()]
        self._older = table.coef_history[:, 1:].tolist()
        self._noise = table.coef_noise.tolist()
        levels = (table.noised_alpha[1:], table.noised_sigma[1:])
        self._kept_levels = np.transpose(levels).tolist()
        self._on_host = isinstance(sample, np.ndarray)
        self._scratch = np.empty_like(sample) if self._on_host else None

    def apply(self, row: int, model_output: Array, *, noise: Array | None) -> None:
        """Go from before ``row`` to after it; ``noise`` lives on the host, None of rows without."""
        depth = len(self._history)
        terms = [
            (self._history[(row - age) % depth], weight)
            for age, weight in enumerate(self._older[row], start=1)
            if weight
        ]
        if noise is not None:
            terms.append((moved(noise, like=self._sample), self._noise[row][0]))
        kept: list[Weighted] = []
        if self._known is not None:
            known = self._known.latents, self._known.noise
            kept = list(zip(known, self._kept_levels[row], strict=True))
        combine = self._by_numpy if self._on_host else self._by_kernel
        combine(self._history[row % depth], model_output, self._factors[row], terms, kept)

    def _by_numpy(
        self,
        newest: Array,
        model_output: Array,
        factors: Factors,
        terms: Iterable[Weighted],
        kept: Iterable[Weighted],
    ) -> None:
        p, q, a, b = factors
        np.multiply(self._sample, p, out=newest)
        self._add(newest, [(model_output, q)])
        self._sample *= a
        self._add(self._sample, [(newest, b), *terms])
        if self._known is not None:
            self._sample *= self._known.repainted
            self._add(self._sample, kept)

    def _add(self, total: Array, terms: Iterable[Weighted]) -> None:
        for array, weight in terms:
            total += np.multiply(array, weight, out=self._scratch)

    def _by_kernel(
        self,
        newest: Array,
        model_output: Array,
        factors: Factors,
        terms: Sequence[Weighted],
        kept: Sequence[Weighted],
    ) -> None:
        kernel = elementwise(*kernel_source(len(terms), keeps=bool(kept)), "sd_update")
        repainted = [] if self._known is None else [self._known.repainted]
        weighted = (part for term in (*terms, *kept) for part in term)
        kernel(model_output, *factors, *repainted, *weighted, newest, self._sample)


@cache
def kernel_source(num_terms: int, *, keeps: bool) -> tuple[str, str, str]:
    """CUDA C++ of one element, as `elementwise` takes it: inputs, outputs, and what is done."""
    terms, kept = range(num_terms), range(num_terms, num_terms + 2 if keeps else num_terms)
    names = ["model_output", *Factors._fields, *(["repainted"] if keeps else [])]
    names += [name for i in (*terms, *kept) for name in (f"array_{i}", f"weight_{i}")]

    def added(numbers: Iterable[int]) -> str:
        return "".join(f" total += weight_{i} * array_{i};" for i in numbers)

    body = "newest = p * sample + q * model_output; float total = a * sample + b * newest;"
    body += added(terms) + (" total *= repainted;" if keeps else "") + added(kept)
    inputs = ", ".join(f"float32 {name}" for name in names)
    return inputs, "float32 newest, float32 sample", f"{body} sample = total;"
