"""The Engine protocol: one compiled component behind named arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from sd_engines.spec import TensorSpec

Array: TypeAlias = Any
"""A numpy array on the CPU; a CuPy array where the engine's device is a GPU."""


class Binding(Protocol):
    """Fixed buffers of one batch: write the inputs in place, run, read the outputs in place."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]

    def run(self) -> None:
        """Run the engine from ``inputs`` into ``outputs``."""


class Engine(Protocol):
    """One compiled component. Thread-compatible: one caller at a time per Binding."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def bind(self, batch: int) -> Binding:
        """Buffers for ``batch`` rows (1 … `Profile.max_batch`), kept and reused per batch."""

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run once on named arrays; the results are the caller's own copies."""

    def close(self) -> None:
        """Free the engine and its buffers; calls after it are an error."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
