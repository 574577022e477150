"""Checkpoints of image variations: what is exported of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from sd_engines.errors import ExportError
from sd_export.cli import main
from sd_export.image_encoder import ImageEncoder
from sd_export.kind import Kind
from sd_export.load import load_model
from sd_export.oracle import image_embeds
from sd_export.small_files import write_small_files
from sd_export.source import find_checkpoint
from tiny import SMALLEST, change_json
from tiny_variation import PROCESSOR, make_variation_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def variation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fastest to export."""
    folder = tmp_path_factory.mktemp("variation") / "checkpoint"
    return make_variation_checkpoint(folder, **SMALLEST)


def test_embeddings_are_diffusers(variation: Path) -> None:
    found = find_checkpoint(str(variation))
    model = load_model(found, "image_encoder")
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3)).astype(np.float32) / 255
    expected = image_embeds(found, model, images)
    assert expected.shape == (2, 1, 8)
    module = ImageEncoder(model, processor=PROCESSOR)
    with torch.no_grad():
        np.testing.assert_allclose(module(torch.from_numpy(images)), expected, atol=1e-5)


def test_the_model_card_travels(variation: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(variation, tmp_path / "carded")
    (folder / "README.md").write_text("# Variations")
    (tmp_path / "bundle").mkdir()
    write_small_files(find_checkpoint(str(folder)), tmp_path / "bundle")
    assert (tmp_path / "bundle/MODEL_CARD.md").read_text() == "# Variations"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("image_encoder/config.json", {"projection_dim": 9}, "its encoder makes 9"),
        ("model_index.json", {"image_encoder": [None, None]}, "has no folder text_encoder"),
    ],
)
def test_what_is_half_for_variations(
    variation: Path, tmp_path: Path, file: str, changes: dict[str, object], message: str
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(variation, folder)
    change_json(folder / file, **changes)
    with pytest.raises(ExportError, match=message):
        find_checkpoint(str(folder))


def test_an_image_encoder_beside_a_text_encoder_is_another_thing(
    smallest: Path, tmp_path: Path
) -> None:
    shutil.copytree(smallest, tmp_path / "copy")
    path = tmp_path / "copy" / "model_index.json"
    index = json.loads(path.read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    path.write_text(json.dumps(index))
    found = find_checkpoint(str(tmp_path / "copy"))
    assert found.kind is Kind.TEXT
    assert "image_encoder" not in found.weights


@pytest.mark.parametrize("changes", [{"crop_size": 24}, {"resample": 2}, {"size": 32}])
def test_pictures_that_are_prepared_otherwise(changes: dict[str, int]) -> None:
    with pytest.raises(ExportError, match="by the bicubic filter and cropped"):
        ImageEncoder(torch.nn.Identity(), processor=PROCESSOR | changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--controlnet", "."], "--controlnet is for prompts"),
        (["--embedding", "style.pt"], "--embedding is for prompts"),
        (["--max-prompt-chunks", "2"], "--max-prompt-chunks is for prompts"),
        (["--lora", "style.safetensors"], "--lora is for prompts"),
        (["--backend", "openvino", "--precision", "int8"], "takes a picture"),
    ],
)
def test_what_is_for_prompts_is_refused(
    variation: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    output = tmp_path / "bundle"
    assert main(["--model", str(variation), "--output", str(output), *options]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
