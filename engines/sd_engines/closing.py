"""Objects that hold a device, memory or a file, and give it back at the end of a ``with`` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType


def close_all(*kept: dict[Any, Any]) -> None:
    """Close and forget every value that is ``kept``.

    Nothing stays in a variable: what is let go of here may be given back to a device at once.
    """
    for objects in kept:
        while objects:
            objects.popitem()[1].close()


class Closing(ABC):
    """A context manager whose end is `close`."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held; twice is allowed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
