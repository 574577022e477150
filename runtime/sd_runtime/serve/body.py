"""What the bodies of all doors have in common: plain JSON, strict types, no unknown names."""

from __future__ import annotations

import reprlib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from sd_engines.errors import ConfigError, nearest

OFF: tuple[object, ...] = (False, 0, "", [], {})
"""The values of a field of another server that switch off what it is for."""


class Body(BaseModel):
    """A JSON object whose fields are checked before anything else happens. Null is left out.

    An unknown field is a `ConfigError` that names the nearest, unless it is one of ``neutral``:
    fields of other servers that are let through with the values that change nothing here; or of
    ``unused``: those that say how to do what another field would switch on, and cannot.
    """

    model_config = ConfigDict(strict=True, extra="ignore")
    neutral: ClassVar[dict[str, tuple[object, ...]]] = {}
    unused: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def check_names(cls, values: Any) -> Any:
        """Refuse what would silently have no effect."""
        if not isinstance(values, dict):
            return values  # pydantic says what it should be
        for name, value in values.items():
            if name in cls.model_fields or name in cls.unused:
                continue
            if name not in cls.neutral:
                raise ConfigError(f"unknown field {name!r}", nearest(name, cls.model_fields))
            if value is not None and value not in cls.neutral[name]:
                raise ConfigError(
                    f"{name} is {reprlib.repr(value)}, which this server cannot do", "Leave it out."
                )
        given = {name: value for name, value in values.items() if value is not None}
        values.clear()  # FastAPI keeps it until the answer
        return given
