"""LoRAs of every spelling change a model's weights as diffusers and PEFT change them."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sd_engines.errors import ConfigError
from sd_export.export import export
from sd_export.load import load_model
from sd_export.lora import find_lora
from sd_export.source import find_checkpoint
from sd_runtime.lora import Lora

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from sd_export import ExportReport

    Tensors = dict[str, torch.Tensor]

RANK, ALPHA = 3, 6.0
COMPONENTS = ("text_encoder", "unet")
UNET = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
)
TEXT = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1")


def layers(checkpoint: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """``unet.`` or ``text_encoder.`` and a layer's name → random down and up."""
    found = find_checkpoint(str(checkpoint))
    generator = torch.Generator().manual_seed(5)
    made = {}
    for component, names in (("unet", UNET), ("text_encoder", TEXT)):
        model = load_model(found, component)
        for name in names:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            down = torch.randn((RANK, *weight.shape[1:]), generator=generator)
            up = torch.randn((len(weight), RANK, *(1,) * (weight.ndim - 2)), generator=generator)
            made[f"{component}.{name}"] = (down, up / 10)
    return made


def kohya(name: str, down: torch.Tensor, up: torch.Tensor) -> Tensors:
    component, _, layer = name.partition(".")
    start = "lora_unet_" if component == "unet" else "lora_te_text_model_"
    key = start + layer.replace(".", "_")
    alpha = torch.tensor(ALPHA)
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}


def peft(name: str, down: torch.Tensor, up: torch.Tensor) -> Tensors:
    name = name.replace("text_encoder.", "text_encoder.text_model.")
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def diffusers(name: str, down: torch.Tensor, up: torch.Tensor) -> Tensors:
    middle = "lora"
    if name.startswith("text_encoder."):
        name, middle = (
            name.replace("text_encoder.", "text_encoder.text_model."),
            "lora_linear_layer",
        )
    return {f"{name}.{middle}.down.weight": down, f"{name}.{middle}.up.weight": up}


def old_diffusers(name: str, down: torch.Tensor, up: torch.Tensor) -> Tensors:
    if ".attn" not in name:
        return diffusers(name, down, up)
    head, _, last = name.removesuffix(".0").rpartition(".")
    key = f"{head}.processor.{last}_lora"
    return {f"{key}.down.weight": down, f"{key}.up.weight": up}


def write(
    path: Path, checkpoint: Path, form: Callable[..., Tensors], **metadata: Mapping[str, object]
) -> Path:
    tensors: Tensors = {}
    for name, (down, up) in layers(checkpoint).items():
        tensors |= form(name, down, up)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        path,
        metadata={"format": "pt", **{key: json.dumps(value) for key, value in metadata.items()}},
    )
    return path


def fused_by_diffusers(checkpoint: Path, loras: Mapping[Path, float]) -> Tensors:
    """The UNet's weights, read from the files by diffusers."""
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
        for path, scale in loras.items():
            state, alphas = pipeline.lora_state_dict(path.parent, weight_name=path.name)
            unet = {key: value for key, value in state.items() if key.startswith("unet.")}
            notes = load_metadata(path)
            pipeline.load_lora_into_unet(
                unet, network_alphas=alphas, unet=pipeline.unet, metadata=notes
            )
            pipeline.fuse_lora(lora_scale=scale)
            pipeline.unload_lora_weights()
    weights: Tensors = pipeline.unet.state_dict()
    return weights


def load_metadata(path: Path) -> dict[str, object] | None:
    """What diffusers notes beside a file's weights."""
    with safe_open(path, framework="pt") as file:
        noted: dict[str, object] | None = json.loads(
            (file.metadata() or {}).get("lora_adapter_metadata", "null")
        )
    return noted


def fused_by_peft(checkpoint: Path, scales: Sequence[float], *, alpha: float) -> Tensors:
    """The text encoder's weights, changed by PEFT's own layers.

    diffusers 0.42 finds no place for a text encoder's LoRA in transformers 5, and only warns.
    """
    from peft import LoraConfig, get_peft_model

    model = load_model(find_checkpoint(str(checkpoint)), "text_encoder")
    made = layers(checkpoint)
    for scale in scales:
        config = LoraConfig(r=RANK, lora_alpha=int(alpha), target_modules=list(TEXT))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that transformers has given up
            wrapped = get_peft_model(model, config)
        for name in TEXT:
            down, up = made[f"text_encoder.{name}"]
            layer: Any = model.get_submodule(name)
            layer.lora_A["default"].weight.data = down
            layer.lora_B["default"].weight.data = up
            layer.scale_layer(scale)
        model = wrapped.merge_and_unload()
    weights: Tensors = model.state_dict()
    return weights


def assert_same(checkpoint: Path, loras: Mapping[Path, float], *, text: Tensors) -> None:
    found = find_checkpoint(str(checkpoint))
    fused = replace(found, loras=tuple(Lora(path, scale) for path, scale in loras.items()))
    for component, tensors, names in (
        ("unet", fused_by_diffusers(checkpoint, loras), UNET),
        ("text_encoder", text, TEXT),
    ):
        before = load_model(found, component).state_dict()
        after = load_model(fused, component).state_dict()
        assert after.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6)
        changed = [name for name in after if not torch.equal(before[name], after[name])]
        assert sorted(changed) == sorted(f"{name}.weight" for name in names)


@pytest.mark.parametrize("form", [kohya, peft, diffusers, old_diffusers])
def test_every_spelling_is_fused_as_diffusers_fuses_it(
    checkpoint: Path, tmp_path: Path, form: Callable[..., Tensors]
) -> None:
    text = fused_by_peft(checkpoint, [0.7], alpha=ALPHA if form is kohya else RANK)
    path = write(tmp_path / "one.safetensors", checkpoint, form)
    assert_same(checkpoint, {path: 0.7}, text=text)


def test_alpha_may_stand_in_the_metadata(checkpoint: Path, tmp_path: Path) -> None:
    noted = {
        f"{component}.{key}": value
        for component, names in (("unet", UNET), ("text_encoder", TEXT))
        for key, value in (
            ("r", RANK),
            ("lora_alpha", ALPHA),
            ("target_modules", list(names)),
            ("use_rslora", component == "unet"),
            ("alpha_pattern", {names[0]: 2.0} if component == "unet" else {}),
        )
    }
    path = write(tmp_path / "a.safetensors", checkpoint, peft, lora_adapter_metadata=noted)
    assert_same(checkpoint, {path: 1.0}, text=fused_by_peft(checkpoint, [1.0], alpha=ALPHA))


def test_several_add_up(checkpoint: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one.safetensors", checkpoint, kohya)
    other = write(tmp_path / "other.safetensors", checkpoint, peft)
    text = fused_by_peft(checkpoint, [ALPHA / RANK * 0.5, -1.5], alpha=RANK)
    assert_same(checkpoint, {one: 0.5, other: -1.5}, text=text)


def test_a_bundle_knows_what_was_fused(
    of_2022: Path, report_of_2022: ExportReport, tmp_path: Path
) -> None:
    shutil.copytree(report_of_2022.path, tmp_path / "bundle")
    path = tmp_path / "style.safetensors"
    save_file(peft("unet.conv_in", torch.ones(RANK, 4, 3, 3), torch.ones(8, RANK, 1, 1)), path)
    plain = export(of_2022, tmp_path / "bundle")
    fused = export(of_2022, tmp_path / "bundle", loras=[f"{path}=0.5"])
    again = export(of_2022, tmp_path / "bundle", loras=[f"{path}=0.5"])
    assert (plain.was_done, fused.was_done, again.was_done) == (True, False, True)
    files = [report.manifest.components["unet"].files for report in (plain, fused)]
    assert files[0] != files[1]
    record = json.loads((tmp_path / "bundle" / "export.json").read_text())
    assert [(lora["file"], lora["scale"]) for lora in record["loras"]] == [(path.name, 0.5)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"unet.conv_in.lora_A.weight": (3, 4, 3, 3)}, "one half of conv_in"),
        ({"unet.conv_in.hada_w1_a": (3, 4)}, "which is no part of a LoRA"),
        ({"lora_te2_x.lora_down.weight": (3, 4)}, "Stable Diffusion XL"),
        ({}, "is empty"),
    ],
)
def test_files_that_are_no_lora(
    tmp_path: Path, keys: Mapping[str, tuple[int, ...]], message: str
) -> None:
    path = tmp_path / "bad.safetensors"
    save_file({name: torch.ones(shape) for name, shape in keys.items()}, path)
    with pytest.raises(ConfigError, match=message):
        find_lora(str(path), components=COMPONENTS)


@pytest.mark.parametrize(
    ("down", "up", "name", "message"),
    [
        ((3, 32), (32, 3), "down_blocks.9.attn1.to_q", "which it has not"),
        ((3, 99), (32, 3), UNET[0], "of another shape"),
    ],
)
def test_layers_that_the_model_has_not(
    checkpoint: Path,
    tmp_path: Path,
    down: tuple[int, ...],
    up: tuple[int, ...],
    name: str,
    message: str,
) -> None:
    path = tmp_path / "other.safetensors"
    tensors = peft(f"unet.{name}", torch.ones(down), torch.ones(up))
    save_file(tensors, path)
    found = replace(
        find_checkpoint(str(checkpoint)), loras=(find_lora(str(path), components=COMPONENTS),)
    )
    load_model(found, "text_encoder")
    with pytest.raises(ConfigError, match=message):
        load_model(found, "unet")


@pytest.mark.parametrize("scales", [(20,), (9, 9), (-20,), (1e39,), (1e39, -1e39)])
def test_sums_that_half_precision_cannot_hold(
    of_2022: Path, tmp_path: Path, scales: tuple[float, ...]
) -> None:
    paths = [tmp_path / f"{index}.safetensors" for index in range(len(scales))]
    for path in paths:
        down, up = torch.full((8, 4, 3, 3), 10.0), torch.full((8, 8, 1, 1), 50.0)
        save_file(peft("unet.conv_in", down, up), path)  # 4,000 everywhere
    loras = tuple(Lora(path, scale) for path, scale in zip(paths, scales, strict=True))
    words = " and ".join(f"{lora.path.name}={lora.scale:g}" for lora in loras)
    with pytest.raises(ConfigError) as caught:
        load_model(replace(find_checkpoint(str(of_2022)), loras=loras), "unet")
    assert caught.value.message == f"conv_in is too large, or not finite, with {words}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.safetensors", "no such file"),
        (".", "is a folder"),
        ("one.safetensors=much", "is no scale"),
        ("one.safetensors=nan", "is no scale"),
        ("one.txt", "not a weight file"),
    ],
)
def test_words_that_name_no_lora(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.safetensors", "one.txt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        find_lora(text, components=COMPONENTS)
