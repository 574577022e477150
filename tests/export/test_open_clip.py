"""Stable Diffusion v2 in one file: what diffusers makes of it, models, tokens and scheduler."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from compvis import original_state
from sd_engines.errors import ConfigError, ExportError
from sd_export.clip_vocabulary import clip_vocabulary
from sd_export.license import copy_license, license_words
from sd_export.load import load_model, load_tokenizer
from sd_export.open_clip import PREFIXES
from sd_export.source import find_checkpoint
from tiny import make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import StableDiffusionPipeline

PROMPTS = ["A red CIRCLE!", "", "hi! !there!!", "café 😀 日本語 <|endoftext|> 123", "circle " * 200]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes of its own where a file can tell them; v2's where it cannot: its heads, its layers."""
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "v2",
        v2=True,
        prediction_type="v_prediction",
        scheduler="DDIMScheduler",
        scheduler_options={"clip_sample": False, "set_alpha_to_one": False},
        tokenizer="vocab.json",
        vocabulary=clip_vocabulary(),
        text_layers=23,
        attention_heads=64,
        block_out_channels=(64, 128),
        cross_attention_dim=128,
        vae_block_out_channels=(32, 64),
        norm_num_groups=32,
    )


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "v2.safetensors"
    save_file(original_state(folder, open_clip=PREFIXES[0]), path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path, file: Path) -> StableDiffusionPipeline:
    import diffusers

    return diffusers.StableDiffusionPipeline.from_single_file(str(file), config=str(folder))


def assert_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_models_are_those_of_diffusers(expected: StableDiffusionPipeline, file: Path) -> None:
    found = find_checkpoint(str(file))
    assert found.family == "stable-diffusion-v2"
    assert found.license == "openrail++"
    text_encoder, unet = load_model(found, "text_encoder"), load_model(found, "unet")
    assert_equal(text_encoder, expected.text_encoder)
    assert_equal(unet, expected.unet)
    assert_equal(load_model(found, "vae"), expected.vae)
    assert unet.config.attention_head_dim == expected.unet.config.attention_head_dim == [1, 2]
    ids = torch.arange(77)[None]
    with torch.no_grad():  # the activation is no weight
        embeds = text_encoder(ids).last_hidden_state
        assert torch.equal(embeds, expected.text_encoder(ids).last_hidden_state)


def test_the_layout_of_generative_models_gives_the_same(
    folder: Path, expected: StableDiffusionPipeline, tmp_path: Path
) -> None:
    save_file(original_state(folder, open_clip=PREFIXES[1]), tmp_path / "turbo.safetensors")
    found = find_checkpoint(str(tmp_path / "turbo.safetensors"))
    assert_equal(load_model(found, "text_encoder"), expected.text_encoder)


def test_token_ids_are_those_of_transformers(
    folder: Path, expected: StableDiffusionPipeline, file: Path
) -> None:
    ids = expected.tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=77
    ).input_ids
    assert ids[1][:4] == [49406, 49407, 0, 0]  # padded with "!", token 0
    for path in (file, folder):
        tokenizer = load_tokenizer(find_checkpoint(str(path)))
        assert [tokenizer.encode(prompt).ids for prompt in PROMPTS] == ids


def test_prediction_type_is_stated_or_assumed_as_diffusers_assumes_it(
    folder: Path, file: Path, tmp_path: Path
) -> None:
    state = original_state(folder, open_clip=PREFIXES[0])
    silent = find_checkpoint(str(file))
    assert silent.prediction_type == "v_prediction"
    assert silent.configs["unet"]["sample_size"] == 96
    assert "--prediction-type" in str(silent.assumed)

    told = find_checkpoint(str(file), prediction_type="epsilon")
    assert (told.prediction_type, told.assumed) == ("epsilon", None)
    assert told.configs["unet"]["sample_size"] == 64

    base = tmp_path / "512-base-ema.ckpt"
    torch.save({"state_dict": state, "global_step": 875000}, base)
    assert find_checkpoint(str(base)).prediction_type == "epsilon"
    torch.save({"state_dict": state, "global_step": 110000}, base)
    assert find_checkpoint(str(base)).prediction_type == "v_prediction"

    trained = tmp_path / "trained.safetensors"
    save_file(state, trained, metadata={"modelspec.prediction_type": "epsilon"})
    found = find_checkpoint(str(trained))
    assert (found.prediction_type, found.assumed) == ("epsilon", None)


def test_a_checkpoint_that_names_no_licence_is_under_its_family_s(
    file: Path, tmp_path: Path
) -> None:
    found = replace(find_checkpoint(str(file)), license=None)
    assert "Stable Diffusion v2 are under CreativeML Open RAIL++-M" in license_words(found)
    copy_license(found, tmp_path)
    assert "derived from Stable Diffusion v2" in (tmp_path / "LICENSE.md").read_text()


def test_prediction_type_is_for_single_files_and_known(folder: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match="is for single files"):
        find_checkpoint(str(folder), prediction_type="epsilon")
    with pytest.raises(ConfigError, match="unknown --prediction-type 'v'"):
        find_checkpoint(str(file), prediction_type="v")


def test_scheduler_is_that_of_the_family(expected: StableDiffusionPipeline, file: Path) -> None:
    import diffusers

    found = dict(find_checkpoint(str(file)).configs["scheduler"])
    assert found["_class_name"] == type(expected.scheduler).__name__ == "DDIMScheduler"
    ours = diffusers.DDIMScheduler.from_config(found)
    theirs = {k: v for k, v in expected.scheduler.config.items() if not k.startswith("_")}
    assert theirs.items() <= ours.config.items()


def test_a_file_that_lacks_a_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    state = original_state(folder, open_clip=PREFIXES[0])
    del state[PREFIXES[0] + "positional_embedding"]
    save_file(state, tmp_path / "v2.safetensors")
    with pytest.raises(ExportError, match="lacks a weight"):
        find_checkpoint(str(tmp_path / "v2.safetensors"))
