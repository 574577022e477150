"""Configs that hold what they may not are refused by the name of their model and field."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from sd_engines.errors import ExportError
from sd_engines.node import refuse_constant
from sd_export.image_encoder import picture_size
from sd_export.image_processor import clip_image_processor
from sd_export.load import load_model
from sd_export.small_files import write_small_files
from sd_export.source import find_checkpoint
from sd_export.wrappers import vae_scaling_factor
from tiny import change_json, make_tiny_vae
from tiny_upscaler import make_upscaler

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(smallest: Path, tmp_path: Path) -> Path:
    return shutil.copytree(smallest, tmp_path / "copy")


def read(folder: Path) -> None:
    """All that an export reads of a checkpoint before it traces."""
    found = find_checkpoint(str(folder))
    assert found.default_size
    assert vae_scaling_factor(found)
    for model in found.weights:
        load_model(found, model)
    (folder / "bundle").mkdir()
    write_small_files(found, folder / "bundle")


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [
        ("text_encoder", "vocab_size", "many"),
        ("text_encoder", "max_position_embeddings", None),
        ("text_encoder", "max_position_embeddings", -1),
        ("text_encoder", "max_position_embeddings", 1 << 40),
        ("text_encoder", "hidden_size", [8]),
        ("text_encoder", "hidden_size", True),
        ("unet", "sample_size", "8"),
        ("unet", "sample_size", 1.5),
        ("unet", "sample_size", [8, "8"]),
        ("unet", "sample_size", [8, 8, 8]),
        ("unet", "in_channels", "x"),
        ("unet", "out_channels", -1),
        ("unet", "block_out_channels", []),
        ("vae", "latent_channels", None),
        ("vae", "latent_channels", "8"),
        ("vae", "block_out_channels", 64),
        ("vae", "scaling_factor", None),
        ("vae", "scaling_factor", "x"),
        ("vae", "scaling_factor", float("inf")),
        ("vae", "sample_size", "512"),
    ],
)
def test_a_field_of_another_type(folder: Path, model: str, field: str, value: Any) -> None:
    change_json(folder / model / "config.json", **{field: value})
    with pytest.raises(ExportError, match=f"^{model}: load: in its config.json {field} is "):
        find_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [
        ("text_encoder", "num_hidden_layers", "two"),
        ("text_encoder", "num_attention_heads", 0),
        ("text_encoder", "hidden_act", "nothing"),
        ("unet", "act_fn", None),
        ("unet", "norm_num_groups", 0),
        ("unet", "attention_head_dim", 0),
        ("unet", "up_block_types", []),
        ("vae", "norm_num_groups", 0),
        ("vae", "down_block_types", None),
    ],
)
def test_what_the_libraries_cannot_use(folder: Path, model: str, field: str, value: Any) -> None:
    change_json(folder / model / "config.json", **{field: value})
    with pytest.raises(ExportError, match=f"^{model}: load: ") as caught:
        read(folder)
    assert caught.value.hint == "Download the checkpoint again."


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ("text_encoder", "vocab_size"),
        ("text_encoder", "hidden_size"),
        ("text_encoder", "max_position_embeddings"),
        ("unet", "block_out_channels"),
        ("vae", "block_out_channels"),
    ],
)
def test_a_field_that_is_missing_is_the_libraries_default(
    folder: Path, model: str, field: str
) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    makers = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextConfig}
    parameters = inspect.signature(makers[model]).parameters
    change_json(folder / "unet/config.json", cross_attention_dim=512 if "hidden" in field else 8)
    change_json(folder / model / "config.json", field)
    found = find_checkpoint(str(folder)).configs[model][field]
    own = parameters[field].default
    assert found == (list(own) if isinstance(own, tuple) else own)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", {"longest_edge": 28}),
        ("size", "28"),
        ("crop_size", {"height": 28}),
        ("image_mean", None),
        ("image_std", [0.5, "x", 0.5]),
        ("resample", "bicubic"),
    ],
)
def test_a_field_of_an_image_processor(
    checkpoint: Path, tmp_path: Path, field: str, value: Any
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    config = folder / "feature_extractor/preprocessor_config.json"
    change_json(config, **{field: value})
    words = rf"^feature_extractor: load: in its preprocessor_config\.json {field} is "
    with pytest.raises(ExportError, match=words):
        find_checkpoint(str(folder))


def test_an_image_processor_without_sizes_is_clips_own() -> None:
    from transformers import CLIPImageProcessorPil

    silent = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    own = CLIPImageProcessorPil()
    assert picture_size(silent) == own.size["shortest_edge"] == own.crop_size["height"]
    pixels = clip_image_processor(silent, height=8, width=16)(torch.zeros(1, 8, 16, 3))
    assert pixels.shape == own([Image.new("RGB", (16, 8))], return_tensors="pt").pixel_values.shape


def test_a_noise_level_that_is_no_number(tmp_path: Path) -> None:
    folder = make_upscaler(tmp_path / "upscaler")
    change_json(folder / "model_index.json", max_noise_level="most")
    with pytest.raises(ExportError, match=r"in its model_index\.json max_noise_level is 'most'"):
        find_checkpoint(str(folder))


@pytest.mark.parametrize("named", ["x", True, -1, ["diffusers"], {"a": 1}])
def test_a_part_that_is_named_otherwise(folder: Path, named: Any) -> None:
    change_json(folder / "model_index.json", text_encoder=named)
    with pytest.raises(ExportError, match=r"text_encoder: load: model_index\.json does not name"):
        find_checkpoint(str(folder))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"act_fn": NaN}', '"x"', "\ud800"])
@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json"])
def test_what_is_no_json(folder: Path, file: str, text: str) -> None:
    (folder / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ExportError, match=file.rpartition("/")[2]):
        find_checkpoint(str(folder))


def test_an_infinity_that_diffusers_writes_is_what_it_takes(folder: Path) -> None:
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    assert "-Infinity" in (folder / "scheduler/scheduler_config.json").read_text()
    read(folder)
    written = (folder / "bundle/scheduler/scheduler_config.json").read_text()
    config = json.loads(written, parse_constant=refuse_constant)
    again = DPMSolverMultistepScheduler.from_config(config)
    assert again.config.lambda_min_clipped == float("-inf")


@pytest.mark.parametrize(
    ("field", "text", "shown"),
    [
        ("steps_offset", "1e999", "inf"),
        ("anything", '{"deeper": [-1e999]}', "{'deeper': [-inf]}"),
        ("anything", '"\\ud800"', r"'\ud800'"),
    ],
)
def test_what_no_bundle_can_hold_of_a_scheduler(
    folder: Path, field: str, text: str, shown: str
) -> None:
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(f'{path.read_text().strip().removesuffix("}")}, "{field}": {text}}}')
    words = f"in its scheduler_config.json '{field}' is {shown}, which no JSON holds"
    with pytest.raises(ExportError, match=re.escape(words)):
        find_checkpoint(str(folder))


def test_of_vaes_and_controlnets_beside_it(smallest: Path, tmp_path: Path) -> None:
    from sd_export.controlnet import with_controlnets
    from sd_export.preview_vae import with_preview_vae
    from sd_export.vae import with_vae

    found = find_checkpoint(str(smallest))
    vae = shutil.copytree(smallest / "vae", tmp_path / "vae")
    change_json(vae / "config.json", latent_channels="4")
    with pytest.raises(ExportError, match=r"vae: load: in its config\.json latent_channels"):
        with_vae(found, str(vae))
    tiny = make_tiny_vae(tmp_path / "tiny")
    change_json(tiny / "config.json", decoder_block_out_channels=None)
    with pytest.raises(ExportError, match=r"preview_vae: load: in its config\.json decoder_block"):
        with_preview_vae(found, str(tiny))
    (tmp_path / "controlnet").mkdir()
    (tmp_path / "controlnet/config.json").write_text('{"block_out_channels": 8}')
    with pytest.raises(ExportError, match=r"controlnet: load: in its config\.json block_out"):
        with_controlnets(found, [str(tmp_path / "controlnet")], feature_cache=False)
