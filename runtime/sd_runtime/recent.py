"""The last things that were made, so that what is asked for again is not made again."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

Key = TypeVar("Key", bound="Hashable")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by what they were made of; `trim` leaves the ``capacity`` that were asked for last."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made now where it is not known; raises what ``make`` raises."""
        if key not in self._known:
            self._known[key] = make()
        self._known.move_to_end(key)
        return self._known[key]

    def trim(self) -> None:
        """Drop what was asked for least recently: called when nobody needs more at once."""
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def clear(self) -> None:
        """Drop everything."""
        self._known.clear()
