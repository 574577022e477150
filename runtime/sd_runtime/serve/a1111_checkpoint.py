"""Which model draws for clients of AUTOMATIC1111's web UI, where one checkpoint is loaded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd_runtime.serve.a1111_bodies import Options
    from sd_runtime.serve.models import Model, Models

_HASH = re.compile(r" \[[0-9a-f]+\]$")


class Checkpoint:
    """One of ``models``: what draws where a request does not say, whoever sent it.

    It is the first, until a client changes it. Lives in the event loop's thread.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.current = models.default

    def of(self, options: Options | None) -> Model:
        """The one that ``options`` name, else the current one; raises as `Models.find`."""
        name = options and options.sd_model_checkpoint
        return self.models.find(without_hash(name)) if name else self.current


def without_hash(name: str) -> str:
    """The name of a model without what that web UI shows behind it: ``canny [0a1b2c3d]``."""
    return _HASH.sub("", name)
