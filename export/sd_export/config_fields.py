"""The fields of a model's config that are read before the model is built, and what they may hold.

All else in a config is for the libraries, which say themselves what they cannot use.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from sd_engines.errors import ExportError
from sd_runtime.task import IMAGE_ENCODER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LARGEST = 2**31 - 1


class _Kind(NamedTuple):
    """What a field may hold, in words for people."""

    words: str
    holds: Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST


def _are_counts(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_count, value))


def _are_named(value: Any, *names: str) -> bool:
    return isinstance(value, dict) and all(_is_count(value.get(name)) for name in names)


_COUNT = _Kind("a whole number above 0", _is_count)
_COUNT_OR_NULL = _Kind("a whole number above 0, or null", lambda v: v is None or _is_count(v))
_COUNTS = _Kind("a list of whole numbers above 0", _are_counts)
_COUNT_OR_COUNTS = _Kind(
    "a whole number above 0, or a list of them", lambda v: _is_count(v) or _are_counts(v)
)
_SIDES = _Kind(
    "a whole number above 0, two of them, or null",
    lambda v: v is None or _is_count(v) or (_are_counts(v) and len(v) == 2),
)
_FACTOR = _Kind("a number above 0", lambda v: type(v) in (int, float) and isfinite(v) and v > 0)
_NOISE_LEVEL = _Kind("a whole number from 0", lambda v: type(v) is int and 0 <= v <= _LARGEST)
_SIZE = _Kind(
    "a whole number above 0, or two by the names height and width",
    lambda v: _is_count(v) or _are_named(v, "height", "width"),
)
_SIZE_OR_EDGE = _Kind(
    "a whole number above 0, or such numbers by the names height and width, or shortest_edge",
    lambda v: _SIZE.holds(v) or _are_named(v, "shortest_edge"),
)
_COLOUR = _Kind(
    "a list of three numbers",
    lambda v: isinstance(v, list) and len(v) == 3 and all(type(n) in (int, float) for n in v),
)
_FILTER = _Kind("one of Pillow's filters, 0 to 5", lambda v: type(v) is int and 0 <= v <= 5)

_TEXT_ENCODER = {
    "hidden_size": _COUNT,
    "max_position_embeddings": _COUNT,
    "projection_dim": _COUNT,
    "vocab_size": _COUNT,
}
_FIELDS: Mapping[str, Mapping[str, _Kind]] = {
    "text_encoder": _TEXT_ENCODER,
    "text_encoder_2": _TEXT_ENCODER,
    IMAGE_ENCODER: {"projection_dim": _COUNT},
    "unet": {
        "block_out_channels": _COUNTS,
        "in_channels": _COUNT,
        "layers_per_block": _COUNT_OR_COUNTS,
        "num_class_embeds": _COUNT_OR_NULL,
        "out_channels": _COUNT,
        "sample_size": _SIDES,
        "time_cond_proj_dim": _COUNT_OR_NULL,
    },
    "vae": {
        "block_out_channels": _COUNTS,
        "in_channels": _COUNT,
        "latent_channels": _COUNT,
        "out_channels": _COUNT,
        "sample_size": _COUNT,
        "scaling_factor": _FACTOR,
    },
    "preview_vae": {
        "decoder_block_out_channels": _COUNTS,
        "latent_channels": _COUNT,
        "scaling_factor": _FACTOR,
    },
    "controlnet": {
        "block_out_channels": _COUNTS,
        "conditioning_embedding_out_channels": _COUNTS,
        "layers_per_block": _COUNT_OR_COUNTS,
    },
    "feature_extractor": {
        "crop_size": _SIZE,
        "ensure_multiple_of": _COUNT_OR_NULL,
        "image_mean": _COLOUR,
        "image_std": _COLOUR,
        "resample": _FILTER,
        "size": _SIZE_OR_EDGE,
    },
    "checkpoint": {"max_noise_level": _NOISE_LEVEL},
}
OF_DEPTH: Mapping[str, _Kind] = {"size": _SIZE}
"""What an image processor's fields may hold where it is a depth estimator's, DPT's own."""
_FILES = {"feature_extractor": "preprocessor_config.json", "checkpoint": "model_index.json"}
"""Where these fields stand, if not in a config.json."""
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "text_encoder": {"hidden_size": 512, "max_position_embeddings": 77, "vocab_size": 49408},
    "text_encoder_2": {"hidden_size": 512, "max_position_embeddings": 77, "vocab_size": 49408},
    "unet": {"block_out_channels": [320, 640, 1280, 1280]},
    "vae": {"block_out_channels": [64]},
    "feature_extractor": {"image_mean": None, "image_std": None},
}
"""What transformers and diffusers take where a config is silent, of fields that must be there.

None where that is not one value, and a config has to say it.
"""


def checked_config(
    model: str, config: Mapping[str, Any], *, stricter: Mapping[str, _Kind] | None = None
) -> dict[str, Any]:
    """``config`` of ``model``, with the libraries' defaults for fields that are read in any case.

    `ExportError` for one of `_FIELDS` that holds what it may not, or one of ``stricter``.
    """
    config = {**_DEFAULTS.get(model, {}), **config}
    for field, kind in {**_FIELDS.get(model, {}), **(stricter or {})}.items():
        if field in config and not kind.holds(config[field]):
            file = _FILES.get(model, "config.json")
            raise ExportError(
                f"in its {file} {field} is {str(config[field])[:60]!r}, not {kind.words}",
                "Download the checkpoint again.",
                component=model,
                stage="load",
            )
    return config
