"""Weights in several files: those that an index names, as diffusers and transformers write them."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sd_engines.errors import ExportError
from sd_export.load import load_model
from sd_export.model_files import weight_files
from sd_export.source import find_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def name_as_before(folder: Path) -> None:
    """Give the files of fp16 shards the names that diffusers gave them until 0.30."""
    (index,) = folder.glob("*.index.fp16.json")
    text = re.sub(r"\.fp16(-\d+-of-\d+)", r"\1.fp16", index.read_text())
    index.with_name(index.name.replace(".index.fp16", ".fp16.index")).write_text(text)
    index.unlink()
    for shard in folder.glob("*.fp16-*"):
        shard.rename(shard.with_name(re.sub(r"\.fp16(-\d+-of-\d+)", r"\1.fp16", shard.name)))


@pytest.mark.parametrize("variant", [None, "fp16", "fp16 as before"])
@pytest.mark.parametrize("model", ["unet", "text_encoder"])
def test_shards_are_read(smallest: Path, tmp_path: Path, model: str, variant: str | None) -> None:
    import diffusers
    import transformers

    folder = shutil.copytree(smallest, tmp_path / "copy")
    kinds = {"unet": diffusers.UNet2DConditionModel, "text_encoder": transformers.CLIPTextModel}
    whole: Any = kinds[model].from_pretrained(smallest / model)
    shutil.rmtree(folder / model)
    variant, *before = variant.split(" ", 1) if variant else [None]
    whole.save_pretrained(folder / model, variant=variant, max_shard_size="3KB")
    if variant:
        with pytest.raises(ExportError) as caught:
            weight_files(folder / model, model, None)
        assert caught.value.hint == "Try --variant fp16."
    if before:
        name_as_before(folder / model)
    paths = weight_files(folder / model, model, variant)
    assert len(paths) > 1
    checkpoint = find_checkpoint(str(smallest))
    checkpoint.weights[model] = paths  # type: ignore[index]
    loaded = load_model(checkpoint, model).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": None}, "names no shards"),
        ({"weight_map": ["x"]}, "names no shards"),
        ({"weight_map": {"conv_in.weight": 1}}, "names no shards"),
        ({"weight_map": {"conv_in.weight": ["x"]}}, "names no shards"),
        ({}, "names no shards"),
        ({"weight_map": {"conv_in.weight": "../elsewhere"}}, "shard ../elsewhere is missing"),
        ({"weight_map": {"conv_in.weight": "x" * 5000}}, "shard xxx"),
        ({"weight_map": {"conv_in.weight": "\0"}}, "is missing"),
    ],
)
def test_an_index_that_names_no_files(tmp_path: Path, index: Any, words: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path.parent / "elsewhere").write_bytes(b"")
    with pytest.raises(ExportError, match=words) as caught:
        weight_files(tmp_path, "unet", None)
    assert len(caught.value.message) < 200
