"""Shapes in a manifest that do not go together are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from sd_engines.entries import ComponentEntry, FileEntry
from sd_engines.errors import BundleError
from sd_engines.manifest import Manifest
from sd_engines.spec import TensorSpec
from tiny_onnx import MODEL, PROFILE, TOKENS, UNET_INPUTS, UNET_OUTPUTS, WIDTH

_FILE = FileEntry(sha256="0" * 64, bytes=1)


def _tensors(shapes: dict[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, "float32", ("batch", *axes)) for name, axes in shapes.items())


def _component(
    name: str, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]]
) -> ComponentEntry:
    file = f"{name}/model.onnx"
    return ComponentEntry(
        file=file,
        files={file: _FILE},
        precision="fp32",
        opset=20,
        inputs=_tensors(inputs),
        outputs=_tensors(outputs),
    )


LATENTS, TILE = (4, 8, 8), (4, 4, 8)
MANIFEST = Manifest(
    model=MODEL,
    profile=PROFILE,
    components={
        "text_encoder": _component(
            "text_encoder", {"input_ids": (TOKENS,)}, {"prompt_embeds": (TOKENS, WIDTH)}
        ),
        "unet": replace(
            _component("unet", {}, {}),
            inputs=(*UNET_INPUTS, *_tensors({"down_block_additional_residual_0": (8, 8, 8)})),
            outputs=(*UNET_OUTPUTS, *_tensors({"deep_features": (32, 8, 8)})),
        ),
        "unet_shallow": _component(
            "unet_shallow",
            {"sample": LATENTS, "timestep": (), "deep_features": (32, 8, 8)},
            {"noise_pred": LATENTS},
        ),
        "vae_decoder": _component("vae_decoder", {"latents": TILE}, {"images": (32, 64, 3)}),
        "vae_encoder": _component(
            "vae_encoder", {"images": (64, 64, 3)}, {"latents": LATENTS, "latents_std": LATENTS}
        ),
        "safety_checker": _component(
            "safety_checker", {"images": (64, 64, 3)}, {"nsfw_content_detected": ()}
        ),
        "control_embedding_0": _component(
            "control_embedding_0", {"control_image": (64, 64, 3)}, {"control_embeds": (32, 8, 8)}
        ),
        "controlnet_0": _component(
            "controlnet_0",
            {"sample": LATENTS, "control_embeds": (32, 8, 8), "conditioning_scale": (1,)},
            {"down_block_additional_residual_0": (8, 8, 8)},
        ),
    },
    files={},
    versions={},
)
INPUTS = [
    (name, "inputs", index, axis)
    for name, component in MANIFEST.components.items()
    for index, spec in enumerate(component.inputs)
    for axis in range(1, len(spec.shape))
    if (name, axis) not in (("vae_decoder", 2), ("vae_decoder", 3))  # of a tile any
]
MODEL_FIELDS = [
    ("model", "latent_channels", 1),
    ("model", "latent_channels", 2),
    ("model", "max_prompt_tokens", 2),
    ("model", "max_prompt_tokens", 78),
    ("profile", "vae_scale_factor", 1),
    ("profile", "vae_scale_factor", 2),
    ("profile", "height", 72),
]


def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(MANIFEST.to_json())
    return data


def _chunks(data: dict[str, Any], tokens: int) -> None:
    data["components"]["unet"]["inputs"][2]["shape"][1] = tokens


@pytest.mark.parametrize(("name", "border", "index", "axis"), INPUTS)
def test_a_shape_that_the_rest_contradicts(name: str, border: str, index: int, axis: int) -> None:
    for change in (1, 3):
        data = _data()
        data["components"][name][border][index]["shape"][axis] += change
        with pytest.raises(BundleError, match=r"components\.\w+\.\w+\[\d\].shape: is \['batch'"):
            Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("border", ["inputs", "outputs"])
def test_a_shape_with_an_axis_too_many(border: str) -> None:
    for name in MANIFEST.components:
        data = _data()
        data["components"][name][border][0]["shape"].append(1)
        with pytest.raises(BundleError, match=r"components\.\w+\.\w+\[\d\].shape: is .*, 1\]"):
            Manifest.from_json(json.dumps(data))


def test_a_shape_of_too_few_axes() -> None:
    for name, component in MANIFEST.components.items():
        for border in ("inputs", "outputs"):
            for index, spec in enumerate(getattr(component, border)):
                for shape in ([], ["batch"], ["batch", 1])[: len(spec.shape)]:
                    data = _data()
                    data["components"][name][border][index]["shape"] = shape
                    with pytest.raises(BundleError, match=r"components\.\w+\.\w+\[\d\].shape: is "):
                        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize(("part", "field", "value"), MODEL_FIELDS)
def test_a_model_or_profile_of_other_shapes(part: str, field: str, value: int) -> None:
    data = _data()
    data[part][field] = value
    with pytest.raises(BundleError, match=r"bundle.json: (components\.\w+\.\w+\[\d\].shape|model)"):
        Manifest.from_json(json.dumps(data))


def test_a_prompt_of_no_words() -> None:
    data = _data()
    data["model"]["max_prompt_tokens"] = 2
    for border, spec in (("inputs", 0), ("outputs", 0)):
        data["components"]["text_encoder"][border][spec]["shape"][1] = 2
    _chunks(data, 2)
    with pytest.raises(BundleError, match="max_prompt_tokens: must be at least 3"):
        Manifest.from_json(json.dumps(data))


def test_a_prompt_in_chunks() -> None:
    data = _data()
    _chunks(data, 2 * TOKENS)
    assert Manifest.from_json(json.dumps(data))
    _chunks(data, 2 * TOKENS + 1)
    with pytest.raises(BundleError, match=r"components.unet.inputs\[2\].shape"):
        Manifest.from_json(json.dumps(data))
