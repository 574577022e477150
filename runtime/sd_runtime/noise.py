"""torch's CPU random normals without torch: same seed, same picture as diffusers.

``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`` is a Mersenne twister
(`numpy.random.RandomState` yields the same 32-bit words) followed by Box and Muller (1958), in one
of two layouts: blocks of 16 in float32, or one value at a time in float64 for fewer than 16 values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sd_engines.errors import ConfigError
from sd_runtime.request import MAX_SEED

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = 16


class NoiseStream:
    """One stream of standard normals: ``torch.Generator("cpu").manual_seed(seed)``.

    Args:
        seed: 0 … 2**64 − 1; anything else is a ConfigError.

    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"seed {seed} is out of range", f"Give a seed from 0 to {MAX_SEED}.")
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)  # torch keeps the low 32 bits too
        self._second_normal: float | None = None

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next ``torch.randn(shape, generator=…)`` of the stream, float32, within 1e-6.

        Source: aten/src/ATen/native/cpu/DistributionTemplates.h (``normal_fill``) and
        aten/src/ATen/core/DistributionsHelper.h (``normal_distribution``).
        """
        size = math.prod(shape)
        if size < _BLOCK:
            values = np.array([self._scalar_normal() for _ in range(size)], np.float32)
            return values.reshape(shape)
        uniforms = self._uniforms(size)
        partial = size % _BLOCK
        values = np.empty(size, np.float32)
        _box_muller(uniforms[: size - partial], values[: size - partial])
        if partial:  # torch draws the last 16 values anew, over those of the last whole block
            _box_muller(self._uniforms(_BLOCK), values[-_BLOCK:])
        return values.reshape(shape)

    def _uniforms(self, size: int) -> NDArray[np.float32]:
        """24-bit uniforms in [0, 1), one word each."""
        words = self._words.randint(0, 2**32, size=size, dtype=np.uint32)
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def _scalar_normal(self) -> float:
        """One normal in double precision; every pair of uniforms yields two, the second is kept."""
        if self._second_normal is not None:
            value, self._second_normal = self._second_normal, None
            return value
        words = [int(word) for word in self._words.randint(0, 2**32, size=4, dtype=np.uint32)]
        angle, radius = (
            ((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in (words[:2], words[2:])
        )
        radius = math.sqrt(-2.0 * math.log1p(-radius))
        angle *= 2.0 * math.pi
        self._second_normal = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(uniforms: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Normals from uniforms, per block of 16: 8 radii, then 8 angles; 8 cosines, then 8 sines."""
    halves = uniforms.reshape(-1, 2, _BLOCK // 2)
    normals = out.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - halves[:, 0]))
    angle = np.float32(2.0 * math.pi) * halves[:, 1]
    np.multiply(radius, np.cos(angle), out=normals[:, 0])
    np.multiply(radius, np.sin(angle), out=normals[:, 1])
