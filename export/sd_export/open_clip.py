"""OpenCLIP's text encoder as the original files of Stable Diffusion v2 and XL hold it.

transformers' CLIPTextModel is the same network under other names, with query, key and value
apart. Stable Diffusion takes the output of the last layer but one: in v2 the last is never made. XL
takes the projection as well, and so it is whole there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sd_export.weights import Place

if TYPE_CHECKING:
    from sd_export.weights import Weights

PREFIXES = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
"""Where files of the original code keep it, and files of its successor, generative-models."""
PAD_TOKEN = "!"  # noqa: S105  (token 0, with which OpenCLIP fills a prompt up)
_MOST_LAYERS = 23
_HEAD_SIZE = 64
_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYERS_PREFIX = "transformer.resblocks."


def open_clip_prefix(weights: Weights) -> str | None:
    """What its names start with in this file; None where the file has none."""
    return next((p for p in PREFIXES if p + "token_embedding.weight" in weights), None)


def whole_open_clip_names(weights: Weights, prefix: str) -> dict[str, Place]:
    """Where each weight of transformers' CLIPTextModelWithProjection lies."""
    names = open_clip_names(weights, prefix, most_layers=weights.count(prefix + _LAYERS_PREFIX))
    places = {f"text_model.{name}": place for name, place in names.items()}
    projection = prefix + "text_projection"
    if projection in weights:
        places["text_projection.weight"] = Place(projection, transposed=True)
    return places


def whole_open_clip_shapes(weights: Weights, prefix: str) -> dict[str, Any]:
    """As `open_clip_shapes`, of all layers, and of the projection."""
    shapes = open_clip_shapes(weights, prefix)
    shapes["num_hidden_layers"] = weights.count(prefix + _LAYERS_PREFIX)
    return shapes | {"projection_dim": weights.shape(prefix + "text_projection")[1]}


def open_clip_names(
    weights: Weights, prefix: str, *, most_layers: int = _MOST_LAYERS
) -> dict[str, Place]:
    """Where each weight of transformers' CLIPTextModel lies.

    What only the full CLIP needs (its projection, the last layer) is passed over.
    """
    places = {new: Place(prefix + old) for old, new in _ENDS.items() if prefix + old in weights}
    start = prefix + _LAYERS_PREFIX
    for name in weights:
        if not name.startswith(start):
            continue
        layer, rest = name.removeprefix(start).split(".", 1)
        if int(layer) >= most_layers:
            continue
        home = f"encoder.layers.{layer}"
        module, _, kind = rest.rpartition(".")
        if module == "attn":  # in_proj_weight, in_proj_bias
            for part, letter in enumerate("qkv"):
                new = f"{home}.self_attn.{letter}_proj.{kind.removeprefix('in_proj_')}"
                places[new] = Place(name, part, 3)
        else:
            places[f"{home}.{_LAYER.get(module, module)}.{kind}"] = Place(name)
    return places


def open_clip_shapes(weights: Weights, prefix: str) -> dict[str, Any]:
    """Sizes of the text encoder, in transformers' words; KeyError where a weight is missing."""
    start = prefix + _LAYERS_PREFIX
    vocab_size, hidden_size = weights.shape(f"{prefix}token_embedding.weight")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // _HEAD_SIZE,
        "intermediate_size": weights.shape(f"{start}0.mlp.c_fc.weight")[0],
        "num_hidden_layers": min(weights.count(start), _MOST_LAYERS),
        "max_position_embeddings": weights.shape(f"{prefix}positional_embedding")[0],
    }
