"""Stable Diffusion XL: folders and single files, against what diffusers makes of them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from compvis import original_state
from sd_engines.errors import ExportError
from sd_engines.spec import Defaults
from sd_export import export
from sd_export.clip_vocabulary import clip_vocabulary
from sd_export.kind import Kind
from sd_export.load import load_model, load_tokenizer
from sd_export.oracle import load_pipeline
from sd_export.source import find_checkpoint
from tiny_xl import make_xl_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

PROMPTS = ["A red CIRCLE!", "", "hi! !there!!", "circle " * 200]
ENCODERS = ("text_encoder", "text_encoder_2")


def file_sized(folder: Path, **options: Any) -> Path:
    """Sizes of its own where a file can tell them, XL's where it cannot: heads, a norm's groups."""
    return make_xl_checkpoint(
        folder,
        vocabulary=clip_vocabulary(),
        head_size=64,
        text_width=64,
        projection_dim=128,
        vae_block_out_channels=(32, 64),
        norm_num_groups=32,
        transformer_layers=2,
        time_embed_dim=256,
        **options,
    )


@pytest.fixture(scope="module", params=["base", "refiner"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    refiner = request.param == "refiner"
    channels = (64, 64, 128) if refiner else (64, 128)
    folder = tmp_path_factory.mktemp("xl") / request.param
    return file_sized(folder, refiner=refiner, block_out_channels=channels)


def test_single_file_is_what_diffusers_makes_of_it(folder: Path, tmp_path: Path) -> None:
    import diffusers

    path = tmp_path / "xl.safetensors"
    save_file(original_state(folder), path)
    refiner = folder.name == "refiner"
    kind = f"StableDiffusionXL{'Img2Img' if refiner else ''}Pipeline"
    expected = getattr(diffusers, kind).from_single_file(str(path), config=str(folder))
    found = find_checkpoint(str(path))
    assert (found.family, found.license) == ("stable-diffusion-xl", "openrail++")
    assert (found.kind is Kind.REFINER) == refiner
    assert found.text_encoders == (ENCODERS[1:] if refiner else ENCODERS)
    assert found.force_zeros_for_empty_prompt == expected.config["force_zeros_for_empty_prompt"]
    assert found.defaults == Defaults(50, 5.0, strength=0.3, inpainting_strength=0.9999)
    for name in (*found.text_encoders, "unet", "vae"):
        ours, theirs = load_model(found, name), getattr(expected, name)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        wanted = theirs.state_dict()
        assert all(torch.equal(t, wanted[n]) for n, t in ours.state_dict().items()), name
    unet = load_model(found, "unet")
    for name in ("attention_head_dim", "up_block_types", "projection_class_embeddings_input_dim"):
        assert list_of(unet.config[name]) == list_of(expected.unet.config[name])
    ids = torch.arange(77)[None]
    with torch.no_grad():  # activations and the place of the end are no weights
        for name in found.text_encoders:
            ours, theirs = load_model(found, name)(ids), getattr(expected, name)(ids)
            assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
            assert torch.equal(ours[0], theirs[0])
    for name in found.text_encoders:
        clip = getattr(expected, name.replace("text_encoder", "tokenizer"))
        padded = clip(PROMPTS, padding="max_length", truncation=True, max_length=77).input_ids
        tokenizer = load_tokenizer(found, name)
        assert [tokenizer.encode(prompt).ids for prompt in PROMPTS] == padded


def list_of(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def test_depth_of_attention_is_told_by_the_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "xl.safetensors"
    save_file(original_state(folder), path)
    depths = find_checkpoint(str(path)).configs["unet"]["transformer_layers_per_block"]
    assert depths == ([1, 2, 2] if folder.name == "refiner" else [1, 2])


def test_inpainting_checkpoint_is_proven_end_to_end(tmp_path: Path) -> None:
    checkpoint = make_xl_checkpoint(tmp_path / "xl", inpainting=True, block_out_channels=(16,))
    manifest = export(checkpoint, tmp_path / "bundle").manifest
    assert [spec.name for spec in manifest.components["unet"].inputs[3:]] == [
        *("mask", "masked_image_latents", "pooled_prompt_embeds", "time_ids")
    ]
    assert (manifest.model.defaults.guidance_scale, manifest.model.family) == (
        7.5,
        "stable-diffusion-xl",
    )
    (proof,) = (entry for entry in manifest.certificate if entry.component == "end_to_end")
    assert proof.metric == "pixels_within_1"
    assert proof.figure >= 0.999


def test_pipeline_of_diffusers_is_that_of_the_checkpoint(folder: Path) -> None:
    pipeline = load_pipeline(find_checkpoint(str(folder)))
    refiner = folder.name == "refiner"
    assert type(pipeline).__name__ == f"StableDiffusionXL{'Img2Img' if refiner else ''}Pipeline"
    assert pipeline.watermark is None
    assert (pipeline.text_encoder is None) == refiner


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_missing_parts_are_named(folder: Path, tmp_path: Path, part: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / part)
    with pytest.raises(ExportError, match=f"has no folder {part}"):
        find_checkpoint(str(copy))


def test_other_conditioning_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "unet/config.json").read_text())
    config["projection_class_embeddings_input_dim"] += 1
    (copy / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="not the pooled prompt and sizes"):
        find_checkpoint(str(copy))
