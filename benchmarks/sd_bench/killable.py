"""Processes of our own that nobody waits for once an error or a signal ends the work with them."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from sd_engines.closing import Closing

if TYPE_CHECKING:
    from types import TracebackType


class Killable(Closing):
    """A context manager whose end is `close`, or `kill` where its block raises."""

    @abstractmethod
    def kill(self) -> None:
        """End it now: it may be in the middle of minutes of work."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()
