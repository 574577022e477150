"""What a UNet predicts, and what solvers want: conversions at a noise level.

Salimans & Ho 2022 (arXiv:2202.00512), appendix D: sample = alpha·x₀ + sigma·ε and
v = alpha·ε − sigma·x₀.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_engines.errors import ConfigError, nearest

if TYPE_CHECKING:
    from sd_runtime.noise_schedule import Level


def x0_prediction(prediction_type: str, level: Level) -> tuple[float, float]:
    """(p, q) with x₀ = p·sample + q·model_output; ConfigError for an unknown prediction type."""
    match prediction_type:
        case "epsilon":
            return 1 / level.alpha, -level.sigma / level.alpha
        case "sample":
            return 0.0, 1.0
        case "v_prediction":
            return level.alpha, -level.sigma
    raise _unknown(prediction_type)


def epsilon_prediction(prediction_type: str, level: Level) -> tuple[float, float]:
    """(p, q) with ε = p·sample + q·model_output; ConfigError for an unknown prediction type."""
    match prediction_type:
        case "epsilon":
            return 0.0, 1.0
        case "sample":
            return 1 / level.sigma, -level.alpha / level.sigma
        case "v_prediction":
            return level.sigma, level.alpha
    raise _unknown(prediction_type)


def unconverted(_prediction_type: str, _level: Level) -> tuple[float, float]:
    """(0, 1): the model's output as it is."""
    return 0.0, 1.0


def _unknown(prediction_type: str) -> ConfigError:
    return ConfigError(
        f"prediction_type {prediction_type!r} is not supported",
        nearest(prediction_type, ("epsilon", "sample", "v_prediction")),
    )
