"""Latencies of a machine that drifts and is disturbed, and files of them, made up from a seed.

Parts of the logarithm of a latency: what differs from run to run (normal), a drift that a sample
shares with its neighbours (autoregressive, half gone after 23), now and then a disturbance that
only ever slows (exponential), and what a process has all its life (normal).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.signal import lfilter

from sd_bench.measurement import Measurement, Sample, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from sd_bench.gate import Sides


@dataclass(frozen=True)
class Noise:
    """Standard deviations of the logarithm; share and mean size of the disturbances."""

    jitter: float = 0.03
    drift: float = 0.02
    memory: float = 0.97
    disturbed: float = 0.05
    disturbance: float = 0.15
    process: float = 0.0

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
SHORT = Noise(jitter=0.03, process=0.015)
"""Of requests of some 10 ms."""


def open_sides(
    noise: Noise, rng: np.random.Generator, *, slowdown: float, count: int
) -> Callable[[tuple[int, int]], AbstractContextManager[Sides]]:
    """Base and new on one machine, ``count`` samples between them; new is slower by a factor."""
    machine = iter(noise.draw(count, rng).tolist())

    @contextmanager
    def opened(order: tuple[int, int]) -> Iterator[Sides]:
        base, new = np.exp(rng.normal(0, noise.process, 2)) * (1, slowdown)
        yield (
            lambda: Sample(0.0, {"total": base * next(machine)}, ()),
            lambda: Sample(0.0, {"total": new * next(machine)}, ()),
        )

    return opened


def measurement(
    noise: Noise = QUIET, *, slowdown: float = 1.0, seed: int = 0, count: int = 40
) -> Measurement:
    """A file's content: ``count`` samples on that machine, three steps each, the PNG unchanging."""
    rng = np.random.default_rng(seed)
    samples = [
        Sample(
            started_s=0.4 * index,
            stages_ms={"tokenize": 0.1, "unet": 0.9 * ms, "png": 5.0, "total": ms},
            unet_steps_ms=[0.2 * ms, 0.3 * ms, 0.4 * ms],
        )
        for index, ms in enumerate((slowdown * noise.draw(count, rng)).tolist())
    ]
    return Measurement(
        bundle="build/shapes.bundle",
        fingerprint="f" * 64,
        backend="openvino",
        precision="fp32",
        settings=Settings(),
        environment={"cpu": "one", "cores": "2", "commit": "aaa", "load_average": "1.0 1.0 1.0"},
        measured_at="2026-11-20T12:00:00+00:00",
        samples=tuple(samples),
        peak_memory_bytes=1,
        profile={"batch_size": 1, "height": 128, "width": 128},
    )
