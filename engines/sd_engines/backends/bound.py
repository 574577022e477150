"""What the engines of all backends have in common: buffers, made once for so many rows and kept."""

from __future__ import annotations

from abc import abstractmethod
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from sd_engines.border import check_arrays, check_batch, check_graph, closed_error, shape_at
from sd_engines.closing import Closing, close_all
from sd_engines.engine import Binding
from sd_engines.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sd_engines.border import Rows
    from sd_engines.engine import Array
    from sd_engines.entries import ComponentEntry, EngineEntry


class KeptBinding(Binding, Protocol):
    """A `Binding` that its engine closes."""

    def close(self) -> None:
        """Let go of the engine; the buffers stay the caller's. Runs after it are an error."""


class BoundEngine(Closing):
    """An `Engine` by what a backend adds: `_new_binding`, and `_release`, which frees the rest.

    ``xp`` is the module of its arrays, numpy or CuPy; ``inputs`` and ``outputs`` are the names,
    dtypes and ranks that the graph itself has.
    """

    def __init__(
        self,
        *,
        component: ComponentEntry,
        engine: EngineEntry,
        max_batch: int,
        xp: Any,
        inputs: Iterable[tuple[str, str, int]],
        outputs: Iterable[tuple[str, str, int]],
    ) -> None:
        self.inputs = {spec.name: spec for spec in component.inputs}
        self.outputs = {spec.name: spec for spec in component.outputs}
        check_graph("inputs", self.inputs, inputs)
        check_graph("outputs", self.outputs, outputs)
        self.entry = engine
        self._max_batch = max_batch
        self._xp = xp
        self._is_open = True
        self._bindings: dict[Rows, KeptBinding] = {}
        self._calls: dict[Rows, KeptBinding] = {}
        self._lock = Lock()

    @abstractmethod
    def _new_binding(
        self, rows: Rows, inputs: dict[str, Array], outputs: dict[str, Array]
    ) -> KeptBinding:
        """A binding to these buffers, which are of ``rows``."""

    @abstractmethod
    def _release(self) -> None:
        """Free what is not a binding's."""

    def bind(self, batch: int, *, pictures: int | None = None) -> KeptBinding:
        """Buffers for ``batch`` rows of ``pictures``, zeroed; the same ones for the same."""
        check_batch(batch, self._max_batch, pictures=pictures)
        with self._lock:
            return self._kept((batch, pictures or batch), self._bindings)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run once, on buffers that `bind` does not hand out; callers on other threads wait.

        Takes numpy's arrays or the engine's own kind, and returns that; on a GPU on CuPy's current
        stream.
        """
        rows = check_arrays(self.inputs, arrays, self._max_batch)
        with self._lock:
            binding = self._kept(rows, self._calls)
            for name, array in arrays.items():
                binding.inputs[name][...] = self._xp.asarray(array)
            binding.run()
            return {name: array.copy() for name, array in binding.outputs.items()}

    def _kept(self, rows: Rows, kept: dict[Rows, KeptBinding]) -> KeptBinding:
        if not self._is_open:
            raise closed_error()
        if rows not in kept:
            try:
                inputs, outputs = (
                    {n: self._xp.zeros(shape_at(s, *rows), s.dtype) for n, s in specs.items()}
                    for specs in (self.inputs, self.outputs)
                )
            except MemoryError as error:  # CuPy's is one
                raise BackendError(
                    f"no memory for the buffers of {rows[0]} rows: {error}",
                    "Free some, or ask for fewer or smaller pictures at once.",
                ) from error
            kept[rows] = self._new_binding(rows, inputs, outputs)
        return kept[rows]

    def close(self) -> None:
        """Free the engine and its buffers; twice is allowed."""
        with self._lock:
            close_all(self._bindings, self._calls)
            if self._is_open:
                self._is_open = False
                self._release()
