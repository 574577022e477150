"""The exceptions of the toolkit.

Every error says what to do next (``hint``) and knows its exit code:

::

    SdError                      1
    ├── ConfigError              2   a request, flag or config value is outside what can be done
    ├── BundleError              3   missing, incomplete, altered, unknown format
    │   └── EngineMismatchError  3   built for another device or version; the hint rebuilds it
    ├── BackendError             4   TensorRT, ONNX Runtime, CUDA, out of memory
    └── ExportError              5   load, trace, pass, build or verify of a component
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable


class SdError(Exception):
    """Base of all errors a caller can act on: what is wrong, and what mends it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        """To pickle it whole, whatever its class takes: errors travel between processes."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class ConfigError(SdError):
    """A request, flag or config value is outside what can be done."""

    exit_code = 2


class BundleError(SdError):
    """The bundle is missing, incomplete, altered or of an unknown format."""

    exit_code = 3


class EngineMismatchError(BundleError):
    """The engine was built for another device or version."""


class BackendError(SdError):
    """An inference backend failed; the original error is chained."""

    exit_code = 4


class ExportError(SdError):
    """A component could not be loaded, traced, rewritten, built or verified."""

    exit_code = 5

    def __init__(self, message: str, hint: str, *, component: str, stage: str) -> None:
        super().__init__(f"{component}: {stage}: {message}", hint)
        self.component = component
        self.stage = stage


def plain(error: Exception) -> str:
    """What ``error`` says; of the system's neither its number nor its path, which ours names."""
    return str(getattr(error, "strerror", None) or error)


def nearest(wrong: str, known: Iterable[str]) -> str:
    """A hint that names the known word nearest to ``wrong``, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    start = f"Did you mean {close[0]!r}? " if close else ""
    return f"{start}Known: {', '.join(names)}."
