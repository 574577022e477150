"""ControlNets at export: what fits a checkpoint, what is refused, and the shapes between the two.

How a bundle with them draws is in tests/runtime/test_controlnet.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch

import sd_export
from controlnets import make_controlnet
from sd_engines.errors import ConfigError, ExportError, SdError
from sd_engines.spec import Profile
from sd_export.borders import borders
from sd_export.controlnet import residual_specs, with_controlnets
from sd_export.load import load_model
from sd_export.source import find_checkpoint
from sd_export.wrappers import model_of, wrap
from tiny import change_json
from tiny_xl import make_xl_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from sd_export.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def controlnet(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For ``smallest``, whose pictures are its latents' size."""
    folder = tmp_path_factory.mktemp("controlnet") / "one"
    return make_controlnet(folder, smallest, seed=1, conditioning_embedding_out_channels=(4,))


@pytest.fixture(scope="module")
def found(smallest: Path, controlnet: Path) -> Checkpoint:
    checkpoint = find_checkpoint(str(smallest))
    return with_controlnets(checkpoint, [str(controlnet)], feature_cache=False)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controlnet") / "xl"
    return make_xl_checkpoint(folder, block_out_channels=(16,))


@pytest.mark.parametrize("size", [(5, 7), (12, 8)])
def test_residuals_have_the_shapes_of_the_models(size: tuple[int, int]) -> None:
    controlnet = diffusers.ControlNetModel(
        block_out_channels=(8, 8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        layers_per_block=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4,),
    )
    height, width = size
    with torch.no_grad():
        down, mid = controlnet(
            torch.zeros(1, 4, height, width),
            torch.zeros(1),
            torch.zeros(1, 3, 8),
            controlnet_cond=torch.zeros(1, 3, height, width),
            return_dict=False,
        )
    profile = Profile(batch_size=1, height=height, width=width, vae_scale_factor=1)
    specs = residual_specs(controlnet.config, profile=profile)
    assert [spec.shape[1:] for spec in specs] == [tuple(t.shape[1:]) for t in (*down, mid)]


def test_the_parts_make_up_the_original(found: Checkpoint, controlnet: Path) -> None:
    profile = Profile(batch_size=1, height=8, width=8, vae_scale_factor=1)
    draw = torch.Generator().manual_seed(0)
    given: dict[str, torch.Tensor] = {}

    def run(component: str) -> dict[str, torch.Tensor]:
        inputs, outputs = borders(component, checkpoint=found, profile=profile)
        for spec in inputs:
            shape = [2, *(int(size) for size in spec.shape[1:])]
            given.setdefault(spec.name, torch.rand(shape, generator=draw))
        module = wrap(
            component,
            load_model(found, model_of(component)),
            checkpoint=found,
            profile=profile,
        )
        with torch.no_grad():
            results = module(*(given[spec.name] for spec in inputs))
        results = results if isinstance(results, tuple) else (results,)
        return {spec.name: result for spec, result in zip(outputs, results, strict=True)}

    given |= run("control_embedding_0")
    residuals = run("controlnet_0")
    given |= residuals
    noise_pred = run("unet")["noise_pred"]

    original: Any = diffusers.ControlNetModel.from_pretrained(controlnet)
    arguments = [given[name] for name in ("sample", "timestep", "encoder_hidden_states")]
    with torch.no_grad():
        down, mid = original(
            *arguments,
            controlnet_cond=given["control_image"].permute(0, 3, 1, 2),
            return_dict=False,
        )
        scales = given["conditioning_scale"]
        expected = [t * scales[:, i, None, None, None] for i, t in enumerate((*down, mid))]
        whole = load_model(found, "unet")(
            *arguments,
            down_block_additional_residuals=tuple(expected[:-1]),
            mid_block_additional_residual=expected[-1],
        ).sample
    for residual, wanted in zip(residuals.values(), expected, strict=True):
        assert torch.equal(residual, wanted)
    assert torch.equal(noise_pred, whole)


def test_it_loads_beside_a_single_file(found: Checkpoint, controlnet: Path) -> None:
    loaded = load_model(replace(found, single_file=True), "controlnet_0")
    original = diffusers.ControlNetModel.from_pretrained(controlnet)
    for (name, one), two in zip(
        loaded.state_dict().items(), original.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "is a ControlNetUnionModel"),
        (
            {"addition_embed_type": "text_time"},
            "for Stable Diffusion XL, the checkpoint is of v1",
        ),
        ({"addition_embed_type": "image"}, "takes further conditioning .one for Kandinsky"),
        ({"cross_attention_dim": 1024}, "prompts of width 1024, the checkpoint's are of 8"),
        ({"block_out_channels": [16]}, "block_out_channels are .16., the UNet's .8."),
        ({"layers_per_block": 2}, "layers_per_block are 2, the UNet's 1"),
        ({"num_class_embeds": 3}, "class labels"),
        ({"global_pool_conditions": True}, "pools its outputs"),
        ({"in_channels": 9}, "9 channels of latents"),
        ({"conditioning_channels": 1}, "1 channels, not 3"),
        ({"conditioning_embedding_out_channels": [4, 8]}, "latent of 2×2 pixels, the VAE of 1×1"),
    ],
)
def test_one_that_does_not_fit_is_refused(
    smallest: Path, controlnet: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    other = shutil.copytree(controlnet, tmp_path / "other")
    path = other / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExportError, match=words) as caught:
        sd_export.export(smallest, tmp_path / "bundle", controlnets=[str(other)])
    assert "Name a ControlNet of the checkpoint's own kind" in caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./no-such-folder", "no such file or folder: ./no-such-folder"),
        ("not an id", "neither a path on this disk nor an id"),
        ("{folder}/diffusion_pytorch_model.safetensors", "is one file"),
        ("{checkpoint}", "config.json is missing"),
        ("{checkpoint}/unet", "is a UNet2DConditionModel"),
    ],
)
def test_what_is_no_controlnet(
    smallest: Path, controlnet: Path, tmp_path: Path, name: str, words: str
) -> None:
    source = name.format(folder=controlnet, checkpoint=smallest)
    with pytest.raises(SdError, match=words):
        sd_export.export(smallest, tmp_path / "bundle", controlnets=[source])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"addition_embed_type": None},
            "for Stable Diffusion v1 or v2, the checkpoint is of XL",
        ),
        ({"addition_time_embed_dim": 16}, "addition_time_embed_dim are 16, the UNet's 8"),
        ({"projection_class_embeddings_input_dim": 64}, "input_dim are 64, the UNet's 72"),
        ({"cross_attention_dim": 768}, "width 768, the checkpoint's are of 48 .*2048 in XL"),
    ],
)
def test_one_that_does_not_fit_xl_is_refused(
    xl: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    folder = tmp_path / "controlnet"
    make_controlnet(folder, xl, seed=0, conditioning_embedding_out_channels=(4, 8))
    checkpoint = find_checkpoint(str(xl))
    assert with_controlnets(checkpoint, [str(folder)], feature_cache=False).controlnets
    change_json(folder / "config.json", **change)
    with pytest.raises(ExportError, match=words):
        sd_export.export(xl, tmp_path / "bundle", controlnets=[str(folder)])


def test_a_refiner_is_not_led(tmp_path: Path) -> None:
    refiner = make_xl_checkpoint(tmp_path / "refiner", refiner=True, block_out_channels=(16,))
    with pytest.raises(ConfigError, match="with a refiner") as caught:
        sd_export.export(refiner, tmp_path / "bundle", controlnets=["./anything"])
    assert "Export the base model" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["refiner"]


def test_wrong_combinations_name_the_right_one(
    smallest: Path, controlnet: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="do not go together"):
        sd_export.export(
            smallest, tmp_path / "bundle", controlnets=[str(controlnet)], feature_cache=True
        )
    checkpoint = find_checkpoint(str(smallest))
    unet = {**checkpoint.configs["unet"], "in_channels": 9}
    inpainting = replace(checkpoint, configs={**checkpoint.configs, "unet": unet})
    with pytest.raises(ConfigError, match="made for inpainting") as caught:
        with_controlnets(inpainting, [str(controlnet)], feature_cache=False)
    assert "plain checkpoint" in caught.value.hint
    assert not list(tmp_path.iterdir())
