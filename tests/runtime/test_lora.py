"""LoRAs put on the engines of a bundle when they are opened, and taken off again."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sd_engines.bundle import hash_files
from sd_engines.errors import BundleError, ConfigError
from sd_export.export import export
from sd_runtime import Pipeline, Request
from sd_runtime.cli import main
from sd_runtime.recipe import Recipe
from tiny import make_smallest_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

REQUEST = Request("a cat", seed=3, num_inference_steps=2, guidance_scale=3)
SHALLOW = Request("a cat", seed=3, num_inference_steps=4, guidance_scale=3, cache_interval=2)
LAYERS = {
    "lora_unet_down_blocks_0_resnets_0_conv1": ((8, 3, 3), 8),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": ((8,), 8),
    "lora_unet_mid_block_attentions_0_proj_in": ((8, 1, 1), 8),
    "lora_unet_up_blocks_0_resnets_1_time_emb_proj": ((32,), 8),
    "lora_te_text_model_encoder_layers_1_mlp_fc1": ((8,), 16),
}


def write_lora(path: Path, *, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A file of kohya's, rank 2, that changes linear and convolutional layers a lot."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, (inward, outward) in LAYERS.items():
        down = torch.randn((2, *inward), generator=generator)
        up = torch.randn((outward, 2, *(1,) * (len(inward) - 1)), generator=generator)
        tensors[f"{key}.lora_down.weight"] = down.to(dtype)
        tensors[f"{key}.lora_up.weight"] = (up / 4).to(dtype)
        tensors[f"{key}.alpha"] = torch.tensor(4.0).to(dtype)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its bundle, and three LoRAs."""
    folder = tmp_path_factory.mktemp("lora")
    make_smallest_checkpoint(folder / "checkpoint", text_layers=2)
    write_lora(folder / "one.safetensors", seed=1)
    write_lora(folder / "other.safetensors", seed=2)
    write_lora(folder / "half.safetensors", seed=3, dtype=torch.bfloat16)
    backends = ("onnxruntime", "openvino")
    export(folder / "checkpoint", folder / "bundle", backends=backends, feature_cache=True)
    return folder


@pytest.fixture(scope="module")
def fused(folder: Path) -> Path:
    """The bundle with all three fused when it was exported."""
    export(folder / "checkpoint", folder / "fused", loras=named(folder), feature_cache=True)
    return folder / "fused"


def named(folder: Path) -> list[str]:
    return [
        f"{folder}/one.safetensors=0.8",
        f"{folder}/other.safetensors=-0.3",
        f"{folder}/half.safetensors",
    ]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_they_do_at_load_what_they_do_at_export(folder: Path, fused: Path, backend: str) -> None:
    with (
        Pipeline.load(fused, threads=1) as expected,
        Pipeline.load(folder / "bundle", backend=backend, loras=named(folder)) as pipeline,
    ):
        for request in (REQUEST, SHALLOW):
            own = expected.generate(request).latents
            found = pipeline.generate(request).latents
            assert np.linalg.norm(found - own) <= 1e-4 * np.linalg.norm(own)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_once_taken_off_they_leave_no_trace(folder: Path, backend: str) -> None:
    with Pipeline.load(folder / "bundle", backend=backend, threads=1) as pipeline:
        before = pipeline.generate(SHALLOW)
        pipeline.use_loras(named(folder))
        changed = pipeline.generate(SHALLOW)
        pipeline.use_loras(named(folder)[:1])
        with pytest.raises(ConfigError):
            pipeline.use_loras([f"{folder}/none.safetensors"])
        less = pipeline.generate(SHALLOW)
        pipeline.use_loras([])
        after = pipeline.generate(SHALLOW)
    latents = [result.latents for result in (before, changed, less)]
    assert not np.allclose(latents[0], latents[1], atol=1e-2)
    assert not np.allclose(latents[1], latents[2], atol=1e-2)
    np.testing.assert_array_equal(after.latents, before.latents)
    assert after.recipes == before.recipes


def test_a_picture_says_what_it_was_drawn_with(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = named(folder)[0]
    drawn = str(tmp_path / "drawn.png")
    bundle = str(folder / "bundle")
    assert main([bundle, "a cat", "-o", drawn, "--num-inference-steps", "2", "--lora", lora]) == 0
    again = [bundle, "--from-image", drawn, "-o", str(tmp_path / "again.png")]
    assert main([*again, "--lora", lora]) == 0
    assert "expect another picture" not in caplog.text
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "drawn.png").read_bytes()
    assert main(again) == 0
    assert "was drawn with other LoRAs" in caplog.text
    assert "which --lora FILE=SCALE puts on" in caplog.text
    with Pipeline.load(bundle, threads=1, loras=[lora]) as pipeline:
        file = pipeline.loras[0].path
        file.rename(tmp_path / file.name)  # it is on the engines
        try:
            (recipe,) = pipeline.generate(REQUEST).recipes
        finally:
            (tmp_path / file.name).rename(file)
    assert Recipe.from_json(json.loads(json.dumps(asdict(recipe)))) == recipe
    assert "Lora hashes: " + recipe.loras[0][:10] in recipe.parameters()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"unet.conv_in.lora_A.weight": (3, 4, 3, 3)}, "one half of conv_in"),
        (
            {
                "lora_unet_no_such.lora_down.weight": (2, 8),
                "lora_unet_no_such.lora_up.weight": (8, 2),
            },
            "which it has not",
        ),
        (
            {
                "unet.conv_in.lora_A.weight": (3, 9, 3, 3),
                "unet.conv_in.lora_B.weight": (8, 3, 1, 1),
            },
            "of another shape",
        ),
        ({"unet.conv_in.hada_w1_a": (3, 4)}, "no part of a LoRA"),
        ({}, "is empty"),
    ],
)
def test_files_that_are_no_lora_of_the_model(
    folder: Path, tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    save_file(
        {name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ConfigError, match=message):
        Pipeline.load(folder / "bundle", threads=1, loras=[str(tmp_path / "a.safetensors")])


def test_a_lora_is_found_again_from_another_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with Pipeline.load("bundle", loras=["one.safetensors"], threads=1) as pipeline:
        monkeypatch.chdir("/")
        pipeline.generate(SHALLOW)


def test_a_lora_that_changed_is_not_half_put_on(folder: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "own.safetensors", seed=1)
    with Pipeline.load(folder / "bundle", loras=[str(path)], threads=1) as pipeline:
        write_lora(path, seed=2)
        pipeline.generate(REQUEST)  # the first one is on its engines
        with pytest.raises(ConfigError, match=r"own\.safetensors was changed"):
            pipeline.generate(SHALLOW)
        pipeline.use_loras([str(path)])
        pipeline.generate(SHALLOW)


def test_one_lora_without_a_list(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"one\.safetensors', no list"):
        Pipeline.load(folder / "bundle", loras=str(folder / "one.safetensors"))


CONV_IN = "unet.conv_in.lora_"
ADAPTER = {f"{CONV_IN}A.weight": (3, 4, 3, 3), f"{CONV_IN}B.weight": (8, 3, 1, 1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet.conv_in.alpha": torch.ones(0)}, "the alpha of conv_in is 0 numbers"),
        ({"unet.conv_in.alpha": torch.ones(2)}, "the alpha of conv_in is 2 numbers"),
        ({"unet.conv_in.alpha": torch.tensor(torch.nan)}, "conv_in is not finite"),
        ({"unet.conv_in.alpha": torch.tensor(torch.inf)}, "conv_in is not finite"),
        ({f"{CONV_IN}B.weight": torch.ones(0, 3, 1, 1)}, "which no LoRA is"),
        ({f"{CONV_IN}B.weight": torch.tensor(1.0)}, "which no LoRA is"),
        ({f"{CONV_IN}A.weight": torch.tensor(1.0)}, "which no LoRA is"),
        (
            {f"{CONV_IN}A.weight": torch.ones(0, 4, 3, 3), f"{CONV_IN}B.weight": torch.ones(8, 0)},
            "which no LoRA is",
        ),
        ({f"{CONV_IN}B.weight": torch.full((8, 3, 1, 1), 3e38)}, "conv_in is not finite"),
    ],
)
def test_a_lora_of_broken_parts(
    folder: Path, tmp_path: Path, changes: dict[str, torch.Tensor], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.ones(shape) for name, shape in ADAPTER.items()} | changes, path)
    with pytest.raises(ConfigError, match=message):
        Pipeline.load(folder / "bundle", threads=1, loras=[str(path)])


@pytest.mark.parametrize(
    ("noted", "message"),
    [
        (
            '{"unet.lora_alpha": 1' + "0" * 400 + "}",
            r"^a\.safetensors: its lora_adapter_metadata cannot be read: int too large",
        ),
        ('{"unet.lora_alpha": Infinity}', "conv_in is not finite"),
        ("[" * 100_000, r"^a\.safetensors: its .* cannot be read: maximum recursion"),
    ],
    ids=["large", "infinite", "deep"],
)
def test_a_lora_of_broken_notes(folder: Path, tmp_path: Path, noted: str, message: str) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {name: torch.ones(shape) for name, shape in ADAPTER.items()}
    save_file(tensors, path, metadata={"lora_adapter_metadata": noted})
    with pytest.raises(ConfigError, match=message):
        Pipeline.load(folder / "bundle", threads=1, loras=[str(path)])


@pytest.mark.parametrize("scale", ["1e+30", "1e+38", "-1e+300"])
def test_a_scale_beyond_all_weights(folder: Path, tmp_path: Path, scale: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.full(shape, 2.0) for name, shape in ADAPTER.items()}, path)
    message = rf"^conv_in is too large.* a\.safetensors={re.escape(scale)}"
    with pytest.raises(ConfigError, match=message):
        Pipeline.load(folder / "bundle", threads=1, loras=[f"{path}={scale}"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello, this is no file of tensors",
        (2**40).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (60).to_bytes(8, "little")
        + b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'.ljust(60),
        (62).to_bytes(8, "little")
        + b'{"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}'.ljust(62)
        + bytes(8),
        (68).to_bytes(8, "little")
        + b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}'.ljust(68)
        + bytes(8),
    ],
)
def test_files_that_are_no_safetensors(folder: Path, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="no safetensors file"):
        Pipeline.load(folder / "bundle", threads=1, loras=[str(path)])


def test_an_older_bundle_says_that_it_must_be_made_again(folder: Path, tmp_path: Path) -> None:
    old = shutil.copytree(folder / "bundle", tmp_path / "old")
    manifest = json.loads((old / "bundle.json").read_text())
    for component in manifest["components"].values():
        component["files"] = {
            name: entry
            for name, entry in component["files"].items()
            if not name.endswith("layers.json")
        }
    (old / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="does not say where the weights"):
        Pipeline.load(old, backend="onnxruntime", loras=named(folder))


@pytest.fixture(scope="module")
def copied(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another of the bundles, for tables of layers that lie."""
    return shutil.copytree(folder / "bundle", tmp_path_factory.mktemp("copied") / "bundle")


def write_table(bundle: Path, table: str) -> None:
    """Put ``table`` in place of the UNet's table of layers, with its hash in the manifest."""
    name = "unet/layers.json"
    (bundle / name).write_text(table)
    manifest = json.loads((bundle / "bundle.json").read_text())
    entry = hash_files(bundle, [name])[name]
    manifest["components"]["unet"]["files"][name] = asdict(entry)
    (bundle / "bundle.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../../other"}, "does not list"),
        ({"offset": None, "more": 1}, "more"),
        *(({"offset": offset}, "lies outside of") for offset in (None, 2.5, "1", [], True)),
        *(({"offset": offset}, "lies outside of") for offset in (-1, 2**62, 10**30)),
        *(({"shape": shape}, "no shape") for shape in ([8, 4, 3, -3], [-1], [], "", {}, [8, 4.0])),
        ({"shape": 8}, "not iterable"),
        ({"shape": [2**40, 2**40]}, "lies outside of"),
        *(({"initializer": value}, "initializer is no str") for value in ([], {}, None)),
        *(({"dtype": value}, "dtype is no str") for value in ([], {}, None)),
        ({"file": []}, "file is no str"),
        ({"transposed": "no"}, "transposed is no bool"),
    ],
)
def test_a_table_of_layers_is_not_trusted(
    folder: Path, copied: Path, change: dict[str, object], message: str
) -> None:
    table = json.loads((folder / "bundle/unet/layers.json").read_text())
    next(iter(table.values())).update(change)
    write_table(copied, json.dumps(table))
    with pytest.raises(BundleError, match=message):
        Pipeline.load(copied, backend="onnxruntime", loras=named(folder))


def test_a_table_too_deep_to_be_read(folder: Path, copied: Path) -> None:
    write_table(copied, "[" * 100_000)
    with pytest.raises(BundleError, match=r"layers.json: maximum recursion"):
        Pipeline.load(copied, backend="onnxruntime", loras=named(folder))
