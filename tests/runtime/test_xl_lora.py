"""LoRAs on bundles of Stable Diffusion XL, against diffusers' own loader and PEFT's layers."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compvis import original_unet_layer
from sd_engines.errors import ConfigError
from sd_export.load import load_model
from sd_export.source import find_checkpoint
from sd_runtime import Pipeline, Request
from sd_runtime.lora import Lora

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from conftest import TinyModel

    Tensors = dict[str, torch.Tensor]

RANK, ALPHA, SCALE = 2, 4.0, 0.7
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
REQUEST = Request("a red circle!", seed=7, num_inference_steps=3, guidance_scale=5)
# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def sgm(component: str, layer: str) -> str:
    """As kohya's scripts name the layers of XL, which they train in the original layout."""
    if component != "unet":
        return kohya(component, layer)
    return "lora_unet_" + original_unet_layer(layer).replace(".", "_")


def kohya(component: str, layer: str) -> str:
    start = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    return f"{start[component]}_{old(component, layer).replace('.', '_')}"


def peft(component: str, layer: str) -> str:
    return f"{component}.{old(component, layer)}"


def first(component: str, layer: str) -> str:
    """As diffusers wrote them in 2023."""
    found = re.fullmatch(r"(.+\.self_attn)\.(q|k|v|out)_proj", old(component, layer))
    if found:
        return f"{component}.{found[1]}.to_{found[2]}_lora"
    found = re.fullmatch(r"(.+\.attn\d)\.(to_\w+)(\.0)?", layer)
    if found:
        return f"unet.{found[1]}.processor.{found[2]}_lora"
    ending = "lora" if component == "unet" else "lora_linear_layer"
    return f"{component}.{old(component, layer)}.{ending}"


def todays(component: str, layer: str) -> str:
    return f"{component}.{layer}"


def old(component: str, layer: str) -> str:
    """As transformers named it when all of these files were made."""
    return f"text_model.{layer}" if component == "text_encoder" else layer


ENDINGS: Mapping[Any, tuple[str, str]] = {
    sgm: ("lora_down", "lora_up"),
    kohya: ("lora_down", "lora_up"),
    peft: ("lora_A", "lora_B"),
    first: ("down", "up"),
    todays: ("lora_A", "lora_B"),
}


def write(
    path: Path, oracle: Any, name: Callable[[str, str], str], components: Sequence[str] = COMPONENTS
) -> Path:
    """A file that changes every layer of the three models, those that no picture needs as well."""
    generator = torch.Generator().manual_seed(0)
    down, up = ENDINGS[name]
    tensors: Tensors = {}
    for component in components:
        for layer, module in getattr(oracle, component).named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                key, shape = name(component, layer), module.weight.shape
                inward = torch.randn((RANK, *shape[1:]), generator=generator)
                outward = torch.randn(
                    (shape[0], RANK, *(1,) * (len(shape) - 2)), generator=generator
                )
                tensors[f"{key}.{down}.weight"] = inward / inward[0].numel() ** 0.5
                tensors[f"{key}.{up}.weight"] = outward / 16
                if down == "lora_down":
                    tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def fused(xl_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers' pipeline with a file of today's names fused: the one form it reads in whole.

    Of the others it finds no place for the first text encoder's layers, since transformers 5
    renamed them, and only warns.
    """
    folder = tmp_path_factory.mktemp("fused")
    oracle = diffusers.StableDiffusionXLPipeline.from_pretrained(xl_model.checkpoint)
    oracle.set_progress_bar_config(disable=True)
    path = write(folder / "todays.safetensors", oracle, todays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle.load_lora_weights(str(folder), weight_name=path.name)
        oracle.fuse_lora(lora_scale=SCALE * ALPHA / RANK)
        oracle.unload_lora_weights()
    return oracle


@pytest.mark.parametrize("name", [sgm, kohya, peft, first])
def test_every_spelling_draws_as_diffusers(
    xl_model: TinyModel, fused: Any, tmp_path: Path, name: Callable[[str, str], str]
) -> None:
    path = write(tmp_path / "one.safetensors", xl_model.oracle, name)
    scale = SCALE * (1 if name in (sgm, kohya) else ALPHA / RANK)
    before = xl_model.pipeline.generate(REQUEST)
    try:
        xl_model.pipeline.use_loras([f"{path}={scale}"])
        replace(xl_model, oracle=fused).assert_same(REQUEST)
        changed = xl_model.pipeline.generate(REQUEST)
    finally:
        xl_model.pipeline.use_loras([])
    assert not np.allclose(changed.latents, before.latents, atol=0.1)
    np.testing.assert_array_equal(xl_model.pipeline.generate(REQUEST).latents, before.latents)
    found = find_checkpoint(str(xl_model.checkpoint))
    for component in COMPONENTS:  # the exporter reads the same file
        model = load_model(replace(found, loras=(Lora(path, scale),)), component)
        for key, weight in getattr(fused, component).state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [sgm, kohya])
def test_diffusers_reads_these_files_so(
    xl_model: TinyModel, fused: Any, tmp_path: Path, name: Callable[[str, str], str]
) -> None:
    """What it reads of kohya's own forms: the UNet and the second text encoder.

    It knows ``add_embedding`` by its original name alone.
    """
    write(tmp_path / "one.safetensors", xl_model.oracle, name)
    oracle = diffusers.StableDiffusionXLPipeline.from_pretrained(xl_model.checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle.load_lora_weights(str(tmp_path), weight_name="one.safetensors")
        oracle.fuse_lora(lora_scale=SCALE)
        oracle.unload_lora_weights()
    for component in ("unet", "text_encoder_2"):
        wanted = getattr(fused, component).state_dict()
        for key, weight in getattr(oracle, component).state_dict().items():
            if name is sgm or not key.startswith("add_embedding"):
                torch.testing.assert_close(weight, wanted[key], rtol=1e-5, atol=1e-6)


def test_of_a_pair_the_base_has_them(
    xl_model: TinyModel, refiner_model: TinyModel, fused: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "one.safetensors", xl_model.oracle, sgm)
    options = {"num_inference_steps": 3, "guidance_scale": 5.0}
    generator = torch.Generator("cpu").manual_seed(7)
    latents = fused(
        "a cat", denoising_end=0.5, output_type="latent", generator=generator, **options
    ).images
    picture = refiner_model.oracle(
        "a cat", image=latents, denoising_start=0.5, generator=generator, **options
    ).images[0]
    request = Request("a cat", seed=7, high_noise_frac=0.5, **options)
    with Pipeline.load(
        xl_model.bundle, threads=1, loras=[f"{path}={SCALE}"], refiner=refiner_model.bundle
    ) as pipeline:
        pixels = pipeline.generate(request).pixels[0].astype(int)
    assert (np.abs(pixels - np.asarray(picture)) <= 1).mean() >= 0.999


def test_a_refiner_has_its_own(refiner_model: TinyModel, tmp_path: Path) -> None:
    picture = np.full((16, 16, 3), 99, np.uint8)
    request = Request("a cat", image=picture, seed=1, num_inference_steps=4, strength=0.5)
    oracle = refiner_model.oracle
    own = write(tmp_path / "own.safetensors", oracle, sgm, ("unet", "text_encoder_2"))
    with Pipeline.load(refiner_model.bundle, threads=1, loras=[f"{own}"]) as pipeline:
        changed = pipeline.generate(request).latents
    assert not np.allclose(changed, refiner_model.pipeline.generate(request).latents, atol=0.1)


@pytest.mark.parametrize(
    ("model", "keys", "words"),
    [
        ("refiner_model", {"lora_te1_text_model_encoder_layers_0_mlp_fc1": (32, 16)}, "no refiner"),
        ("refiner_model", {"lora_unet_input_blocks_9_0_op": (8, 8)}, "which it has not"),
        ("tiny_model", {"lora_te2_text_projection": (8, 8)}, "for Stable Diffusion XL"),
        ("xl_model", {"lora_te1_text_model_encoder_layers_3_mlp_fc1": (32, 16)}, "it has not"),
        ("xl_model", {"lora_te2_text_projection": (8, 8)}, "of another shape"),
        (
            "xl_model",
            {
                "lora_unet_output_blocks_0_1_proj_in": (32, 32),
                "lora_unet_up_blocks_0_attentions_0_proj_in": (32, 32),
            },
            "twice",
        ),
    ],
)
def test_files_of_other_models(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    model: str,
    keys: Mapping[str, tuple[int, int]],
    words: str,
) -> None:
    tensors = {}
    for key, (outward, inward) in keys.items():
        tensors[f"{key}.lora_down.weight"] = torch.ones(RANK, inward)
        tensors[f"{key}.lora_up.weight"] = torch.ones(outward, RANK)
    save_file(tensors, tmp_path / "other.safetensors")
    tiny: TinyModel = request.getfixturevalue(model)
    before = tiny.pipeline.loras
    with pytest.raises(ConfigError, match=words) as caught:
        tiny.pipeline.use_loras([f"{tmp_path}/other.safetensors"])
    assert caught.value.hint
    assert tiny.pipeline.loras == before
    lora = Lora(tmp_path / "other.safetensors", 1)
    checkpoint = replace(find_checkpoint(str(tiny.checkpoint)), loras=(lora,))
    with pytest.raises(ConfigError, match=words):
        [load_model(checkpoint, name) for name in (*checkpoint.text_encoders, "unet")]
