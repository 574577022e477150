"""Where the weights of each layer lie in a component's files: what a LoRA at load changes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import onnx
import torch

from sd_export.onnx_export import external_place
from sd_export.onnx_passes import TRANSPOSED
from sd_runtime.layer_table import table_file

if TYPE_CHECKING:
    from pathlib import Path

_HALF_NAMES = (".float16", ".bfloat16")


def write_layer_table(onnx_path: Path, *, module: torch.nn.Module, model: torch.nn.Module) -> Path:
    """Describe the graph at ``onnx_path``, traced from ``module``, by the layers of ``model``."""
    names = {id(layer): name for name, layer in model.named_modules()}
    layers = {
        name: names[id(layer)]
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }
    graph = onnx.load(onnx_path, load_external_data=False).graph
    table = {}
    for tensor in graph.initializer:
        name = tensor.name
        for ending in _HALF_NAMES:
            name = name.removesuffix(ending)
        layer, weight, _ = name.removesuffix(TRANSPOSED).rpartition(".weight")
        if weight and layer in layers and tensor.external_data:
            external = external_place(tensor)
            table[layers[layer]] = {
                "initializer": tensor.name,
                "dtype": onnx.TensorProto.DataType.Name(tensor.data_type).lower(),
                "shape": list(tensor.dims),
                "transposed": name.endswith(TRANSPOSED),
                "file": external["location"],
                "offset": int(external.get("offset", 0)),
            }
    path = onnx_path.with_name(table_file(onnx_path.name))
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return path
