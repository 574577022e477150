"""Linear forms, so that solvers read as in their papers and come out as rows of a table.

A solver computes with symbols in place of tensors: the sample, the converted model outputs (newest
first) and the noise are unit vectors, and what it returns for the next sample *is* the row's
coefficients. A solver that starts again from an older sample rewinds to it: an update is affine in
its sample, so the older sample follows from the newer one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

DEPTH = 13
"""Longest history: PNDM's Runge-Kutta warm-up looks 12 rows back, all other solvers at most 4."""

Form: TypeAlias = "NDArray[np.float64]"
"""float64 [1 + DEPTH + 2]: coefficients of the sample, h_0 … h_(DEPTH-1), noise, last noise."""

_SYMBOLS: NDArray[np.float64] = np.eye(1 + DEPTH + 2)
SAMPLE: Form = _SYMBOLS[0]
NOISE: Form = _SYMBOLS[-2]
LAST_NOISE: Form = _SYMBOLS[-1]
"""The noise of the row before; it must have cancelled in every finished update."""


def history(age: int) -> Form:
    """The converted model output of ``age`` rows ago; 0 is this row's."""
    return np.asarray(_SYMBOLS[1 : 1 + DEPTH][age])


def weighted_sum(weights: Sequence[float] | NDArray[np.float64], forms: Iterable[Form]) -> Form:
    """Σ weight · form."""
    return np.asarray(np.asarray(weights) @ np.array(list(forms)))


def substitute(update: Form, start: Form) -> Form:
    """``update`` with ``start`` in place of its sample."""
    return np.asarray(update + update[0] * (start - SAMPLE))


def rewind(update: Form) -> Form:
    """The sample that ``update`` started from, as a form of the row after it.

    There the update's result is the sample, its h_k is h_(k+1) and its noise the last noise.
    """
    form = np.empty_like(update)
    form[0] = 1.0
    form[1] = 0.0
    form[2:-2] = -update[1:-3]
    form[-2] = 0.0
    form[-1] = -update[-2]
    form /= update[0]
    return form
