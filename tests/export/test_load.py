"""Checkpoints in every form become the same torch modules, or an error that says what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from compvis import original_state
from sd_engines.errors import ConfigError, ExportError
from sd_engines.spec import Defaults
from sd_export.clip_vocabulary import clip_vocabulary
from sd_export.kind import Kind
from sd_export.load import load_model, load_tokenizer
from sd_export.oracle import load_pipeline
from sd_export.single_file_names import single_file_names
from sd_export.source import find_checkpoint
from sd_export.weights import Weights
from tiny import make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    expected = one.state_dict()
    found = other.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.float()), name


def test_models_are_those_of_the_libraries(checkpoint: Path) -> None:
    import diffusers
    import transformers

    found = find_checkpoint(str(checkpoint))
    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae")
    text_encoder = transformers.CLIPTextModel.from_pretrained(checkpoint / "text_encoder")
    assert_equal(unet, load_model(found, "unet"))
    assert_equal(vae, load_model(found, "vae"))
    assert_equal(text_encoder, load_model(found, "text_encoder"))
    ids = torch.arange(77)[None]
    with torch.no_grad():
        expected = text_encoder.eval()(ids).last_hidden_state
        assert torch.equal(load_model(found, "text_encoder")(ids).last_hidden_state, expected)


def test_both_tokenizer_forms_give_the_same_ids(checkpoint: Path, tmp_path: Path) -> None:
    import transformers

    new = make_checkpoint(tmp_path / "new", tokenizer="tokenizer.json")
    prompts = ["A red CIRCLE", "", "café 😀 日本語 <|endoftext|> 123", "circle " * 200]
    expected = transformers.CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")(
        prompts, padding="max_length", truncation=True, max_length=77
    ).input_ids
    for folder in (checkpoint, new):
        tokenizer = load_tokenizer(find_checkpoint(str(folder)))
        assert [tokenizer.encode(prompt).ids for prompt in prompts] == expected


def test_symlinked_files_load_as_in_the_cache_of_the_hub(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.rglob("*"):
        if path.is_file():
            link = tmp_path / path.relative_to(checkpoint)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path)
    assert_equal(
        load_model(find_checkpoint(str(checkpoint)), "unet"),
        load_model(find_checkpoint(str(tmp_path)), "unet"),
    )


def test_variant_and_half_weights_load_as_float32(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    for path in folder.glob("*/*.safetensors"):
        halves = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(halves, path.with_suffix(".fp16.safetensors"))
        path.unlink()
    with pytest.raises(ExportError, match="no weights") as caught:
        find_checkpoint(str(folder))
    assert "--variant fp16" in caught.value.hint
    unet = load_model(find_checkpoint(str(folder), variant="fp16"), "unet")
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    original = load_model(find_checkpoint(str(checkpoint)), "unet")
    assert torch.equal(unet.conv_in.weight, original.conv_in.weight.half().float())


def test_pickled_weights_of_a_folder_load(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    path = folder / UNET_FILE
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert_equal(
        load_model(find_checkpoint(str(checkpoint)), "unet"),
        load_model(find_checkpoint(str(folder)), "unet"),
    )


def test_old_attention_names_of_the_vae_load(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(path)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    assert any(".proj_attn." in key for key in state)
    save_file(state, path)
    assert_equal(
        load_model(find_checkpoint(str(checkpoint)), "vae"),
        load_model(find_checkpoint(str(folder)), "vae"),
    )


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_file_gives_the_same_models(
    single_file_checkpoint: Path, tmp_path: Path, ema: bool, suffix: str
) -> None:
    state = original_state(single_file_checkpoint, ema=ema)
    path = tmp_path / f"v1{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 1, "epoch": 2}, path)
    else:
        save_file(state, path)
    found = find_checkpoint(str(path))
    expected = find_checkpoint(str(single_file_checkpoint))
    for model in ("unet", "vae"):
        assert_equal(load_model(expected, model), load_model(found, model))
    assert load_model(found, "unet").config.block_out_channels == [32, 32, 64, 64]
    assert found.license == "creativeml-openrail-m"


def test_a_latent_consistency_model_loads_from_both_layouts(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path / "lcm",
        time_cond_proj_dim=256,
        scheduler="LCMScheduler",
        block_out_channels=(32,),
        vae_block_out_channels=(8,),
        cross_attention_dim=64,
    )
    save_file(original_state(folder), tmp_path / "lcm.safetensors")
    expected = find_checkpoint(str(folder))
    found = find_checkpoint(str(tmp_path / "lcm.safetensors"))
    assert_equal(load_model(expected, "unet"), load_model(found, "unet"))
    assert found.defaults == expected.defaults == Defaults(4, 8.5)
    for key in ("_class_name", "beta_start", "beta_schedule", "set_alpha_to_one"):
        assert found.configs["scheduler"][key] == expected.configs["scheduler"][key]


def test_a_single_file_for_inpainting_is_known_by_its_shapes(
    single_file_checkpoint: Path, tmp_path: Path
) -> None:
    state = original_state(single_file_checkpoint)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    state[name] = torch.randn(len(state[name]), 9, 3, 3)
    save_file(state, tmp_path / "inpainting.safetensors")
    found = find_checkpoint(str(tmp_path / "inpainting.safetensors"))
    assert found.kind is Kind.INPAINTING
    assert found.latent_channels == 4
    unet = load_model(found, "unet")
    assert torch.equal(unet.conv_in.weight, state[name])
    assert find_checkpoint(str(single_file_checkpoint)).kind is Kind.TEXT


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint"])
def test_the_unet_says_whether_a_folder_is_for_inpainting(
    checkpoint: Path, tmp_path: Path, kind: str, channels: int
) -> None:
    folder = copy_of(checkpoint, tmp_path)
    for file, changes in (
        ("model_index.json", {"_class_name": f"StableDiffusion{kind}Pipeline"}),
        ("unet/config.json", {"in_channels": channels}),
    ):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | changes))
    assert (find_checkpoint(str(folder)).kind is Kind.INPAINTING) == (channels == 9)


def test_single_file_names_are_those_of_diffusers(
    single_file_checkpoint: Path, tmp_path: Path
) -> None:
    from diffusers.loaders import single_file_utils

    state = original_state(single_file_checkpoint)
    save_file(state, tmp_path / "v1.safetensors")
    unet_config = json.loads((single_file_checkpoint / "unet/config.json").read_text())
    vae_config = json.loads((single_file_checkpoint / "vae/config.json").read_text())
    with Weights((tmp_path / "v1.safetensors",), component="checkpoint") as weights:
        assert (
            single_file_names(weights, "unet").keys()
            == single_file_utils.convert_ldm_unet_checkpoint(dict(state), unet_config).keys()
        )
        assert (
            single_file_names(weights, "vae").keys()
            == single_file_utils.convert_ldm_vae_checkpoint(dict(state), vae_config).keys()
        )


def test_the_vocabulary_in_the_package_is_that_of_clip() -> None:
    vocabulary, merges = clip_vocabulary()
    # published ids: openai/clip-vit-large-patch14
    known = {"!": 0, "a</w>": 320, "cat</w>": 2368, "photo</w>": 1125, "dog</w>": 1929}
    known |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: vocabulary[token] for token in known} == known
    assert (len(vocabulary), len(merges)) == (49408, 48894)


def test_pipeline_is_the_unmodified_one(checkpoint: Path) -> None:
    import diffusers

    found = load_pipeline(find_checkpoint(str(checkpoint)))
    assert type(found) is diffusers.StableDiffusionPipeline
    expected = diffusers.StableDiffusionPipeline.from_pretrained(
        checkpoint, safety_checker=None, requires_safety_checker=False
    )
    expected.set_progress_bar_config(disable=True)

    def latents(pipeline: diffusers.StableDiffusionPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return pipeline(
            "a cat", num_inference_steps=2, generator=generator, output_type="latent"
        ).images

    assert torch.equal(latents(found), latents(expected))


def with_nan(folder: Path) -> None:
    state = load_file(folder / UNET_FILE)
    state["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, folder / UNET_FILE)


def without_a_weight(folder: Path) -> None:
    state = load_file(folder / UNET_FILE)
    del state["conv_out.bias"]
    save_file(state, folder / UNET_FILE)


def with_a_wrong_shape(folder: Path) -> None:
    state = load_file(folder / UNET_FILE)
    state["conv_out.bias"] = torch.zeros(7)
    save_file(state, folder / UNET_FILE)


def truncated(folder: Path) -> None:
    data = (folder / UNET_FILE).read_bytes()
    (folder / UNET_FILE).write_bytes(data[: len(data) // 2])


def in_integers(folder: Path) -> None:
    state = load_file(folder / UNET_FILE)
    state["conv_out.bias"] = torch.zeros(4, dtype=torch.int8)
    save_file(state, folder / UNET_FILE)


def with_an_absurd_config(folder: Path) -> None:
    config = json.loads((folder / "unet/config.json").read_text())
    config["down_block_types"] = ["NoSuchBlock", "DownBlock2D"]
    (folder / "unet/config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (with_nan, "conv_in.weight holds values that are not finite"),
        (without_a_weight, "1 weights are missing, the first is conv_out.bias"),
        (with_a_wrong_shape, r"conv_out.bias has shape \(7,\)"),
        (truncated, "cannot read"),
        (in_integers, "torch.int8"),
        (with_an_absurd_config, "config cannot be used"),
    ],
)
def test_broken_weights_are_named(
    checkpoint: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    folder = copy_of(checkpoint, tmp_path)
    spoil(folder)
    found = find_checkpoint(str(folder))
    with pytest.raises(ExportError, match=words) as caught:
        load_model(found, "unet")
    assert str(caught.value).startswith("unet: load: ")
    assert caught.value.hint


class RunsCode:
    """What a hostile checkpoint holds: unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    witness = tmp_path / "witness"
    hostile = {"state_dict": {"x": torch.zeros(1)}, "y": RunsCode(f"touch {witness}")}
    path = tmp_path / "hostile.ckpt"
    torch.save(hostile, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ExportError, match="was not run") as caught:
        find_checkpoint(str(path))
    assert "safetensors" in caught.value.hint
    assert not witness.exists()
    torch.load(path, weights_only=False)  # that it would have run is what makes the test one
    assert witness.exists()


def test_a_plain_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = tmp_path / "hostile.ckpt"
    path.write_bytes(pickle.dumps(RunsCode(f"touch {witness}")))
    with pytest.raises(ExportError):
        find_checkpoint(str(path))
    assert not witness.exists()


def test_class_names_of_a_training_framework_are_not_imported(
    single_file_checkpoint: Path, tmp_path: Path
) -> None:
    """The original v1 files carry callbacks of pytorch_lightning beside their weights."""
    package = tmp_path / "pytorch_lightning"
    package.mkdir()
    witness = tmp_path / "witness"
    (package / "__init__.py").write_text("")
    (package / "callbacks.py").write_text("class ModelCheckpoint:\n    pass\n")
    import subprocess
    import sys

    weights = tmp_path / "weights.pt"
    path = tmp_path / "v1.ckpt"
    torch.save(original_state(single_file_checkpoint), weights)
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch, pytorch_lightning.callbacks as c\n"
            f"state = torch.load({str(weights)!r})\n"
            "held = c.ModelCheckpoint(); held.best = 1\n"
            "extra = {c.ModelCheckpoint: {'best': held}}\n"
            f"torch.save({{'state_dict': state, 'callbacks': extra}}, {str(path)!r})\n",
        ],
        cwd=tmp_path,
        check=True,
    )
    (package / "callbacks.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    sys.path.insert(0, str(tmp_path))
    try:
        found = find_checkpoint(str(path))
    finally:
        sys.path.remove(str(tmp_path))
    assert not witness.exists()
    assert "pytorch_lightning" not in sys.modules
    expected = find_checkpoint(str(single_file_checkpoint))
    assert_equal(load_model(expected, "unet"), load_model(found, "unet"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.diffusion_model.label_emb.0.0.weight", "no VAE"),
        ("model.diffusion_model.label_emb.weight", "upscaler"),
        ("low_scale_model.x", "upscaler"),
        ("control_model.time_embed.0.weight", "ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "ControlNet"),
        ("depth_model.model.x", "depth-to-image"),
        ("noise_augmentor.time_embed.0.weight", "unCLIP"),
        ("down_blocks.0.motion_modules.0.x", "AnimateDiff"),
        ("joint_blocks.0.x", "Stable Diffusion 3"),
        ("double_blocks.0.x", "Flux"),
        ("clip_txt_mapper.weight", "Stable Cascade"),
        ("lora_unet_down.weight", "LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "LoRA"),
        ("down_blocks.0.resnets.0.conv1.weight", "one model of a folder"),
        ("decoder.up_blocks.0.resnets.0.conv1.weight", "one model of a folder"),
        ("text_model.final_layer_norm.weight", "one model of a folder"),
        ("something.else", "no UNet"),
    ],
)
def test_single_files_of_other_families_are_named(tmp_path: Path, name: str, words: str) -> None:
    save_file({name: torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ExportError, match=words):
        find_checkpoint(str(tmp_path / "other.safetensors"))


def test_a_single_file_that_lacks_a_weight_is_refused(
    single_file_checkpoint: Path, tmp_path: Path
) -> None:
    state = original_state(single_file_checkpoint)
    del state["model.diffusion_model.out.2.weight"]
    save_file(state, tmp_path / "v1.safetensors")
    with pytest.raises(ExportError, match="lacks a weight"):
        find_checkpoint(str(tmp_path / "v1.safetensors"))


def test_a_name_that_no_bundle_can_hold_is_refused(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(smallest, tmp_path / os.fsdecode(b"caf\xe9") / "checkpoint")
    with pytest.raises(ConfigError, match="is not UTF-8") as caught:
        find_checkpoint(str(folder))
    assert "from its own folder" in caught.value.hint
    monkeypatch.chdir(folder.parent)
    assert find_checkpoint("checkpoint").source == "checkpoint"


def test_not_a_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        find_checkpoint("./nowhere")
    with pytest.raises(ConfigError, match="no such file or folder"):
        find_checkpoint("missing.safetensors")
    with pytest.raises(ConfigError, match="neither a path"):
        find_checkpoint("a/b/c")
    with pytest.raises(ExportError, match=r"model_index\.json"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match="not a checkpoint file"):
        find_checkpoint(str(tmp_path / "notes.txt"))
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    with pytest.raises(ExportError, match="cannot read"):
        find_checkpoint(str(tmp_path / "junk.safetensors"))
    (tmp_path / "junk.ckpt").write_bytes(b"")
    with pytest.raises(ExportError, match="cannot read"):
        find_checkpoint(str(tmp_path / "junk.ckpt"))
    with pytest.raises(ConfigError, match="--revision"):
        find_checkpoint(str(checkpoint), revision="main")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_missing_component_is_named(checkpoint: Path, tmp_path: Path, part: str) -> None:
    folder = copy_of(checkpoint, tmp_path)
    shutil.rmtree(folder / part)
    with pytest.raises(ExportError, match=f"^{part}: load: ") as caught:
        find_checkpoint(str(folder))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("unet/config.json", {"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ("unet/config.json", {"addition_embed_type": "text_image"}, "Kandinsky"),
        ("unet/config.json", {"class_embed_type": "projection"}, "unCLIP"),
        ("unet/config.json", {"num_class_embeds": 1000}, "upscaler"),
        ("unet/config.json", {"in_channels": 5}, "depth to image"),
        ("unet/config.json", {"in_channels": 7}, "upscaler"),
        ("unet/config.json", {"in_channels": 8}, "InstructPix2Pix"),
        ("unet/config.json", {"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
        ("unet/config.json", {"cross_attention_dim": 2048}, "prompts of width 2048"),
        ("vae/config.json", {"_class_name": "VQModel"}, "VQModel"),
    ],
)
def test_folders_of_other_families_are_named(
    checkpoint: Path, tmp_path: Path, file: str, changes: dict[str, object], words: str
) -> None:
    folder = copy_of(checkpoint, tmp_path)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | changes))
    with pytest.raises(ExportError, match=words):
        find_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("class_name", "words"),
    [
        ("StableDiffusionXLControlNetPipeline", "ControlNet"),
        ("StableDiffusionXLInstructPix2PixPipeline", "InstructPix2Pix"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("StableDiffusionControlNetPipeline", "ControlNet"),
        ("StableDiffusionAdapterPipeline", "T2I-Adapter"),
        ("StableUnCLIPImg2ImgPipeline", "unCLIP"),
        ("StableDiffusionInstructPix2PixPipeline", "InstructPix2Pix"),
        ("StableVideoDiffusionPipeline", "video"),
        ("AnimateDiffPipeline", "AnimateDiff"),
        ("FluxPipeline", "Flux"),
        ("KandinskyV22Pipeline", "Kandinsky"),
        ("PixArtAlphaPipeline", "PixArt"),
        ("StableCascadeDecoderPipeline", "Stable Cascade"),
        ("IFPipeline", "DeepFloyd IF"),
        ("TomorrowsPipeline", "TomorrowsPipeline"),
        (None, "None"),
    ],
)
def test_pipelines_of_other_kinds_are_named(
    tmp_path: Path, class_name: str | None, words: str
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    with pytest.raises(ExportError, match=words) as caught:
        find_checkpoint(str(tmp_path))
    assert "not supported" in caught.value.message
    assert "sd-export takes" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "ControlNetModel"}, "a ControlNetModel by itself"),
        ({"architectures": ["CLIPTextModel"]}, "a CLIPTextModel by itself"),
        ({"architectures": []}, "no checkpoint"),
        ({}, "no checkpoint"),
    ],
)
def test_a_model_by_itself_is_named(tmp_path: Path, config: dict[str, object], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=words):
        find_checkpoint(str(tmp_path))


def test_broken_json_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    (folder / "unet/config.json").write_text("{")
    with pytest.raises(ExportError, match=r"cannot read config\.json"):
        find_checkpoint(str(folder))


def test_what_is_called_a_licence_and_is_none(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    (folder / "LICENSE").mkdir()
    (folder / "LICENSE.md").symlink_to(tmp_path / "nowhere")
    (folder / "LICENSE.txt").write_text("Free.")
    assert find_checkpoint(str(folder)).licenses == (folder / "LICENSE.txt",)


def test_libraries_are_quiet_from_their_first_import_on() -> None:
    code = (
        "import logging\nfrom sd_export.load import quiet\n"
        "with quiet():\n    import diffusers, transformers\n"
        "    names = ('diffusers', 'transformers')\n"
        "    assert all(logging.getLogger(name).level == logging.ERROR for name in names)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
