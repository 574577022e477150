"""The strict reader of `bundle.json`: one `Node` per object, every field accounted for.

A bundle may come from a stranger, so nothing is taken on trust: every field must be there, be of
its type and within its range; no field may be unknown; no path may leave the folder.
"""

from __future__ import annotations

import re
import sys
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from sd_engines.errors import BundleError
from sd_engines.spec import GRAPH_PRECISIONS, Precision

if TYPE_CHECKING:
    from collections.abc import Callable

MANIFEST_NAME = "bundle.json"
REMAKE_HINT = "Make the bundle again: sd-export --model MODEL --output BUNDLE"
COPY_HINT = f"Copy it again, if it is a copy. Or: {REMAKE_HINT}"
"""For files that are not as they were sealed."""
READ_HINT = "Let this user read it: chmod -R a+rX BUNDLE"
OTHER_VERSION_HINT = f"Install the sd-toolkit that made it. Or: {REMAKE_HINT}"
"""For what a manifest says: it may be right, and of a toolkit that knows more."""

_T = TypeVar("_T")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DEEPEST = 16
"""More than any field has. Python's json recurses in C, as does who copies what it read, and a
caller's thread may have little stack: its own limit is for threads of megabytes."""
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Node:
    """One JSON object being read: each field is taken once, with its type and range.

    Every method takes the field it is named after and raises `BundleError` where it is missing or
    not what it must be; `end` where a field was not taken. A ``nullable`` field may be null, a
    ``younger`` one may be missing: bundles of before the field have none.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise wrong(where, "must be an object")
        self._fields: dict[str, Any] = dict(value)
        self.where = where

    def _at(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _take(self, key: str) -> Any:
        if key not in self._fields:
            raise wrong(self._at(key), "is missing")
        return self._fields.pop(key)

    def _is_given(self, key: str) -> bool:
        """Whether the field is there and not null; a null is taken."""
        if self._fields.get(key) is None:
            self._fields.pop(key, None)
            return False
        return True

    def text(self, key: str, *, one_of: tuple[str, ...] | None = None) -> str:
        """A text that is not empty and has no control characters; one of ``one_of`` where given."""
        value = self._take(key)
        if not isinstance(value, str) or not value:
            raise wrong(self._at(key), "must be a text that is not empty")
        if _UNPRINTABLE.search(value):
            raise wrong(self._at(key), "holds control characters")
        if one_of is not None and value not in one_of:
            raise wrong(self._at(key), f"{value!r} is none of {', '.join(one_of)}")
        return value

    def nullable_text(self, key: str) -> str | None:
        """A text, or None where the field is null."""
        if self._fields.get(key, "") is None:
            self._take(key)
            return None
        return self.text(key)

    def younger_nullable_text(self, key: str) -> str | None:
        """The same, and None where it is not there."""
        return self.text(key) if self._is_given(key) else None

    def younger_texts(self, key: str) -> tuple[str, ...]:
        """An array of texts, empty where the field is not there."""
        if key not in self._fields:
            return ()
        texts = {str(index): text for index, text in enumerate(self.array(key))}
        return tuple(Node(texts, self._at(key)).texts().values())

    def precision(self, *, of_graph: bool = False) -> Precision:
        """One of the precisions of `sd_engines.spec`; ``of_graph``: one that a graph can be in."""
        known = GRAPH_PRECISIONS if of_graph else get_args(Precision)
        value: Precision = self.text("precision", one_of=known)  # type: ignore[assignment]
        return value

    def integer(self, key: str, *, low: int = 0, high: int = 2**53) -> int:
        """A whole number from ``low`` to ``high``; true and 1.0 are none."""
        value = self._take(key)
        if type(value) is not int or not low <= value <= high:
            raise wrong(self._at(key), f"must be a whole number from {low} to {high}")
        return value

    def younger_nullable_integer(self, key: str, *, high: int) -> int | None:
        """A whole number from 0 to ``high``, None where the field is null or not there."""
        return self.integer(key, high=high) if self._is_given(key) else None

    def number(self, key: str) -> float:
        """A finite number, as float."""
        value = self._take(key)
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        raise wrong(self._at(key), "must be a finite number")

    def younger_share(self, key: str, default: float) -> float:
        """A number from 0 to 1, ``default`` where the field is not there."""
        value = self.number(key) if key in self._fields else default
        if not 0 <= value <= 1:
            raise wrong(self._at(key), "must be a number from 0 to 1")
        return value

    def younger_flag(self, key: str) -> bool:
        """True or false, false where the field is not there."""
        value = self._take(key) if key in self._fields else False
        if not isinstance(value, bool):
            raise wrong(self._at(key), "must be true or false")
        return value

    def sha256(self, key: str) -> str:
        """64 lower-case hexadecimal digits."""
        value = self.text(key)
        if not _SHA256.fullmatch(value):
            raise wrong(self._at(key), "must be 64 lower-case hexadecimal digits")
        return value

    def path(self, key: str) -> str:
        """A relative path that stays inside the bundle."""
        return relative_path(self.text(key), self._at(key))

    def mapping(self, key: str) -> dict[str, Any]:
        """Any object, as it is."""
        value = self._take(key)
        if not isinstance(value, dict):
            raise wrong(self._at(key), "must be an object")
        return value

    def younger_nullable_mapping(self, key: str) -> dict[str, Any] | None:
        """Any object, None where the field is null or not there."""
        return self.mapping(key) if self._is_given(key) else None

    def array(self, key: str) -> list[Any]:
        """Any array, as it is."""
        value = self._take(key)
        if not isinstance(value, list):
            raise wrong(self._at(key), "must be an array")
        return value

    def node(self, key: str) -> Node:
        """The object in ``key``, to be read in turn."""
        return Node(self._take(key), self._at(key))

    def younger_node(self, key: str) -> Node | None:
        """The object in ``key``, None where the field is not there."""
        return self.node(key) if key in self._fields else None

    def entries(self, key: str, read: Callable[[Node], _T]) -> tuple[_T, ...]:
        """An array of objects, each read by ``read``."""
        where = self._at(key)
        return tuple(read(Node(v, f"{where}[{i}]")) for i, v in enumerate(self.array(key)))

    def younger_entries(self, key: str, read: Callable[[Node], _T]) -> tuple[_T, ...]:
        """The same, none where the field is not there."""
        return self.entries(key, read) if key in self._fields else ()

    def named(
        self, key: str, read: Callable[[Node], _T], check_name: Callable[[str, str], str]
    ) -> dict[str, _T]:
        """An object of objects: names checked, each value read by ``read``."""
        where = self._at(key)
        return {
            check_name(name, where): read(Node(value, f"{where}.{name}"))
            for name, value in self.mapping(key).items()
        }

    def texts(self) -> dict[str, str]:
        """All fields that are left, each a text."""
        return {key: self.text(key) for key in tuple(self._fields)}

    def end(self) -> None:
        """Refuse what was not taken."""
        if self._fields:
            raise wrong(self._at(next(iter(self._fields))), "is unknown")


def wrong(where: str, problem: str) -> BundleError:
    """The error that names the field ``where``, such as ``engines[0].file``."""
    where = where if where.isprintable() else ascii(where)
    where = where if len(where) <= 300 else where[:300] + "…"
    return BundleError(": ".join(filter(None, (MANIFEST_NAME, where, problem))), OTHER_VERSION_HINT)


def check_depth(text: str) -> None:
    """`ValueError` for JSON that is nested deeper than a thread of little stack can read."""
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of `json.loads` that refuses a name given twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object names one field twice")
    return value


def refuse_constant(name: str) -> None:
    """``parse_constant`` of `json.loads` that refuses NaN and the infinities."""
    raise ValueError(f"{name} is no JSON number")


def relative_path(text: str, where: str) -> str:
    """A relative POSIX path in its one normal form that stays inside the folder."""
    parts = text.split("/")
    if (
        _UNPRINTABLE.search(text)
        or "\\" in text
        or len(text.encode()) > 1024
        or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        or ":" in parts[0]
        or PurePosixPath(text).is_absolute()
        or text == MANIFEST_NAME
    ):
        raise wrong(where, f"{text[:200]!r} is no path of a file inside the bundle")
    return text
