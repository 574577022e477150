"""The straight line through measured points: a fixed cost, and a cost per unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class Line:
    """``y = fixed + per_unit · x``, by least squares.

    ``residual`` is the root mean square of what the line misses, in y's unit. ``fixed_error`` and
    ``per_unit_error`` are standard errors; they are None for two points, which no line misses, and
    ``r_squared``, the share of y's variance that x explains, is None also where y never varies.
    """

    fixed: float
    per_unit: float
    fixed_error: float | None
    per_unit_error: float | None
    r_squared: float | None
    residual: float

    def at(self, x: float) -> float:
        """The line's y."""
        return self.fixed + self.per_unit * x


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The line through the points (x, y); `ConfigError` where fewer than two x differ."""
    if len(set(x)) < 2:
        raise ConfigError(
            f"a line needs two different points, not {sorted(set(x))}", "Measure at one more."
        )
    n, xs, ys = len(x), np.asarray(x, np.float64), np.asarray(y, np.float64)
    around_x, around_y = xs - xs.mean(), ys - ys.mean()
    spread_x, spread_y = float(around_x @ around_x), float(around_y @ around_y)
    per_unit = float(around_x @ around_y) / spread_x
    fixed = float(ys.mean() - per_unit * xs.mean())
    missed = around_y - per_unit * around_x
    squares = float(missed @ missed)
    fixed_error = per_unit_error = r_squared = None
    if n > 2:
        per_unit_error = (squares / (n - 2) / spread_x) ** 0.5
        fixed_error = per_unit_error * float(xs @ xs / n) ** 0.5
        r_squared = 1 - squares / spread_y if spread_y else None
    return Line(
        fixed=fixed,
        per_unit=per_unit,
        fixed_error=fixed_error,
        per_unit_error=per_unit_error,
        r_squared=r_squared,
        residual=(squares / n) ** 0.5,
    )
