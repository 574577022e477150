"""Whether what was read from a file is what its dataclass says, field by field."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from sd_engines.spec import Precision

_NAMES: Final = {"Mapping": Mapping, "Sequence": Sequence, "Precision": Precision}
"""What dataclasses import for their types alone."""


def check_fields(value: Any, where: str = "") -> None:
    """`TypeError` that names the first field of the dataclass ``value`` that is not of its type.

    Numbers are finite; a whole one stands for a float too, and true and false for neither.
    """
    hints = get_type_hints(type(value), localns=_NAMES)
    for field in fields(value):
        _check(getattr(value, field.name), hints[field.name], f"{where}{field.name}")


def _check(value: Any, expected: Any, where: str) -> None:
    kind, arguments = get_origin(expected) or expected, get_args(expected)
    if kind in (Union, UnionType):  # of None and one other
        (inner,) = (each for each in arguments if each is not NoneType)
        if value is not None:
            _check(value, inner, where)
    elif kind is Literal:
        _demand(value in arguments, value, where)
    elif is_dataclass(kind):
        _demand(type(value) is kind, value, where)
        check_fields(value, f"{where}.")
    elif kind is Mapping:
        _demand(isinstance(value, dict), value, where)
        for name, item in value.items():
            _check(item, arguments[1], f"{where}.{name}")
    elif kind in (tuple, Sequence):
        _demand(isinstance(value, tuple), value, where)
        for index, item in enumerate(value):
            _check(item, arguments[0], f"{where}[{index}]")
    elif kind is float:
        finite = type(value) in (int, float) and abs(value) <= sys.float_info.max
        _demand(finite, value, where)
    else:
        _demand(type(value) is kind, value, where)


def _demand(holds: bool, value: Any, where: str) -> None:
    if not holds:
        raise TypeError(f"{where} is {value!r:.80}")
