"""Latencies of a machine that drifts and is disturbed, made up with a fixed seed.

Parts of the logarithm of a latency: what differs from run to run (normal), a drift that a sample
shares with its neighbours (autoregressive, half gone after 23), and now and then a disturbance
that only ever slows (exponential).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.signal import lfilter

from sd_bench.measurement import Sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Noise:
    """Standard deviations of the logarithm; share and mean size of the disturbances."""

    jitter: float = 0.03
    drift: float = 0.02
    memory: float = 0.97
    disturbed: float = 0.05
    disturbance: float = 0.15

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """``count`` latencies in a row, in ms, around 300."""
        shocks = rng.normal(size=count) * self.drift * np.sqrt(1 - self.memory**2)
        shocks[0] = rng.normal() * self.drift  # the drift began long before
        log_ms = lfilter([1.0], [1.0, -self.memory], shocks)
        log_ms += rng.normal(0, self.jitter, count)
        log_ms += (rng.random(count) < self.disturbed) * rng.exponential(self.disturbance, count)
        return np.asarray(300 * np.exp(log_ms))


QUIET = Noise(jitter=0.01, drift=0.01, disturbed=0.02)
NOISY = Noise()


def samplers(
    noise: Noise, rng: np.random.Generator, *, slowdown: float, count: int
) -> tuple[Callable[[], Sample], Callable[[], Sample]]:
    """Base and new on one machine, ``count`` samples between them; new is slower by a factor."""
    machine = iter(noise.draw(count, rng).tolist())
    return (
        lambda: Sample(0.0, {"total": next(machine)}, ()),
        lambda: Sample(0.0, {"total": slowdown * next(machine)}, ()),
    )
