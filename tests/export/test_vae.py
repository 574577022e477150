"""A VAE put in the place of a checkpoint's own: read from every layout, drawn with as diffusers."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compvis import original_state
from pictures import recipe_in
from sd_engines.errors import ConfigError, ExportError, SdError
from sd_export.load import load_model
from sd_export.source import find_checkpoint
from sd_export.vae import with_vae
from sd_runtime import Pipeline, Request
from tiny import make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHTS = "diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def test_pictures_are_those_of_diffusers_with_that_vae(
    smallest: Path, other: Path, bundle_of_two_vaes: Path, tmp_path: Path
) -> None:
    request = Request("a cat", seed=3, num_inference_steps=2)
    picture = np.full((8, 8, 3), 90, np.uint8)
    picture[2:5, 1:4] = (200, 30, 10)
    again = Request("a cat", seed=3, num_inference_steps=4, image=picture, strength=0.5)
    with Pipeline.load(bundle_of_two_vaes, threads=1) as pipeline:
        assert pipeline.bundle.manifest.model.vae == str(other / "vae")
        result, encoded = pipeline.generate(request), pipeline.generate(again)
    (path,) = result.save(tmp_path / "cat.png")
    recipe = recipe_in(path)
    assert recipe.vae == str(other / "vae")
    assert f"VAE: {other / 'vae'}" in recipe.parameters()

    vae = diffusers.AutoencoderKL.from_pretrained(other / "vae")
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(smallest, vae=vae)
    from_image = diffusers.StableDiffusionImg2ImgPipeline(
        **oracle.components, requires_safety_checker=False
    )
    for drawn, pipe, inputs in (
        (result, oracle, {"num_inference_steps": 2}),
        (encoded, from_image, {"image": again.image.image, "strength": 0.5}),
    ):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(3)
        inputs = {"num_inference_steps": 4, **inputs}
        expected = np.asarray(pipe("a cat", generator=generator, **inputs).images[0])
        within = np.abs(drawn.pixels[0].astype(int) - expected.astype(int)) <= 1
        assert within.mean() >= 0.999


def in_original_layout(checkpoint: Path) -> dict[str, torch.Tensor]:
    """As vae-ft-mse-840000-ema-pruned has them: no prefix."""
    state = original_state(checkpoint)
    prefix = "first_stage_model."
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


@pytest.mark.parametrize("form", ["alone", "checkpoint", "ckpt", "folder", "pt"])
def test_every_layout_gives_the_same_model(
    single_file_checkpoint: Path, tmp_path: Path, form: str
) -> None:
    path = tmp_path / f"vae.{form if form in ('ckpt', 'pt') else 'safetensors'}"
    state = in_original_layout(single_file_checkpoint)
    if form == "folder":
        path = single_file_checkpoint
    elif form == "checkpoint":
        save_file(original_state(single_file_checkpoint), path)
    elif form == "alone":
        save_file(state, path)
    else:  # as training leaves it
        noise = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}
        torch.save({"state_dict": {**state, **noise}, "global_step": 840_000}, path)
    checkpoint = with_vae(find_checkpoint(str(single_file_checkpoint)), str(path))
    expected = diffusers.AutoencoderKL.from_pretrained(single_file_checkpoint / "vae").state_dict()
    found = load_model(checkpoint, "vae").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncated(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: edited(f, latent_channels=16), "16 channels of latents, .* own 4"),
        (lambda f: edited(f, scaling_factor=0.13025), "0.13025 as its scaling factor"),
        (lambda f: edited(f, shift_factor=0.1), "shifts its latents"),
        (lambda f: edited(f, block_out_channels=[8, 8]), "makes 2 pixels of one latent"),
        (lambda f: edited(f, _class_name="AutoencoderTiny"), "AutoencoderTiny, not an Auto"),
        (truncated, "cannot read"),
        (lambda f: (f / WEIGHTS).unlink(), "no weights"),
        (lambda f: (f / "config.json").unlink(), "neither config.json nor vae/config.json"),
    ],
)
def test_a_folder_that_does_not_fit_leaves_nothing_behind(
    smallest: Path, other: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    from sd_export import export

    folder = shutil.copytree(other / "vae", tmp_path / "vae")
    spoil(folder)
    with pytest.raises(ExportError, match=words):
        export(smallest, tmp_path / "bundle", vae=str(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vae"]


def test_files_that_hold_no_vae(smallest: Path, other: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(str(smallest))
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 99)
    save_file(load_file(other / "vae" / WEIGHTS), tmp_path / "diffusers.safetensors")
    state = in_original_layout(other)
    save_file({"decoder.up.0.x": torch.ones(1)}, tmp_path / "part.safetensors")
    (tmp_path / "hostile.pt").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    save_file(state, tmp_path / "vae.txt")
    for name, kind, words in (
        ("junk.safetensors", ExportError, "cannot read"),
        ("diffusers.safetensors", ExportError, "no VAE in the original layout"),
        ("part.safetensors", ExportError, "lacks a weight"),
        ("hostile.pt", ExportError, "asks for more than tensors"),
        ("vae.txt", ConfigError, "not a weight file"),
        ("no.safetensors", ConfigError, "no such file or folder"),
        ("../no such", ConfigError, "no such file or folder"),
        ("no such", ConfigError, "neither a path"),
    ):
        path = tmp_path / name
        with pytest.raises(SdError, match=words) as caught:
            with_vae(checkpoint, str(path) if path.exists() or "." in name else name)
        assert isinstance(caught.value, kind)
        assert caught.value.hint


def test_another_number_of_pixels_a_latent(smallest: Path, tmp_path: Path) -> None:
    """Real weights of another factor, not only a config that says so."""
    shape = {"block_out_channels": (8,), "cross_attention_dim": 8, "attention_heads": 2}
    other = make_checkpoint(tmp_path / "x2", vae_block_out_channels=(8, 8), **shape)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="2 pixels of one latent, the checkpoint's own 1"):
        with_vae(find_checkpoint(str(smallest)), str(other))
