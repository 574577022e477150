"""Whose turn it is among requests that draw in the same buffers."""

from __future__ import annotations

from threading import RLock
from typing import TYPE_CHECKING, TypeVar

from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

_Made = TypeVar("_Made")


class Turns:
    """It is always that of the newest. Whoever holds ``lock`` keeps other threads waiting."""

    def __init__(self) -> None:
        self.lock = RLock()
        self._newest: object = None

    def take(self) -> object:
        """A turn, with which all others end."""
        with self.lock:
            self._newest = object()
            return self._newest

    def run(self, turn: object, work: Callable[[], _Made]) -> _Made:
        """What ``work`` makes; `ConfigError` where ``turn`` has ended."""
        with self.lock:
            if self._newest is not turn:
                raise ConfigError(
                    "another request, or other LoRAs, came before this one had ended",
                    "Draw one after the other, or load a pipeline for each.",
                )
            return work()
