"""Checkpoints of depth to image: what is exported of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from transformers.models.dpt.image_processing_pil_dpt import get_resize_output_image_size

from depth_estimators import HYBRID, LARGE, PROCESSOR, make_depth_checkpoint, make_estimator
from sd_engines.errors import ExportError
from sd_engines.spec import BATCH, Profile, TensorSpec
from sd_export.cli import main
from sd_export.depth_estimator import DepthEstimator, _resized
from sd_export.load import load_model
from sd_export.onnx_export import MODEL_FILE, save, trace
from sd_export.oracle import depth_mask
from sd_export.source import find_checkpoint
from sd_export.verify import probe_inputs, relative_l2
from tiny import SMALLEST

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As stabilityai/stable-diffusion-2-depth."""
    folder = tmp_path_factory.mktemp("hybrid") / "checkpoint"
    return make_depth_checkpoint(folder, v2=True, sample_size=24, **SMALLEST)


def changed(checkpoint: Path, folder: Path, file: str, changes: dict[str, Any]) -> Path:
    """A copy of ``checkpoint`` with other values in one of its JSON files."""
    shutil.copytree(checkpoint, folder)
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | changes))
    return folder


def test_a_hybrid_estimator_is_computed_by_both_backends(tmp_path: Path) -> None:
    """To what exports hold them to; one without a BiT is exported for the runtime's tests."""
    profile = Profile(batch_size=2, height=24, width=24, vae_scale_factor=2)
    module = DepthEstimator(make_estimator(HYBRID), processor=PROCESSOR, profile=profile)
    shapes = {"images": (BATCH, 24, 24, 3), "depth_mask": (BATCH, 1, 12, 12)}
    images, mask = (TensorSpec(name, "float32", shape) for name, shape in shapes.items())
    graph = trace(module.eval(), component="depth_estimator", inputs=[images], outputs=[mask])
    assert "BatchNormalization" not in {node.op_type for node in graph.graph}
    save(graph, tmp_path / "depth_estimator")
    path = tmp_path / "depth_estimator" / MODEL_FILE
    probe = probe_inputs("depth_estimator", [images], profile=profile, vocab_size=0)["images"]
    with torch.no_grad():
        expected = module(torch.from_numpy(probe)).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert relative_l2(session.run(None, {"images": probe})[0], expected) <= 1e-4
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert relative_l2(compiled({"images": probe})[0], expected) <= 1e-4


@pytest.mark.parametrize("size", [(64, 64), (40, 24)])
def test_estimates_are_diffusers(hybrid: Path, size: tuple[int, int]) -> None:
    found = find_checkpoint(str(hybrid))
    model = load_model(found, "depth_estimator")
    profile = Profile(batch_size=2, height=size[0], width=size[1], vae_scale_factor=8)
    module = DepthEstimator(model, processor=PROCESSOR, profile=profile)
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.float32) / 255
    expected = depth_mask(found, model, images, vae_scale_factor=8)
    assert expected.shape == (2, 1, size[0] // 8, size[1] // 8)
    assert expected.min(axis=(1, 2, 3)).tolist() == [-1, -1]
    assert expected.max(axis=(1, 2, 3)).tolist() == [1, 1]
    with torch.no_grad():
        np.testing.assert_allclose(module(torch.from_numpy(images)), expected, atol=1e-4)


def test_batch_norms_are_loaded(hybrid: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(hybrid, folder)
    estimator = make_estimator({**LARGE, "use_batch_norm_in_fusion_residual": True})
    estimator.save_pretrained(folder / "depth_estimator")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = (
            model(pixels).predicted_depth
            for model in (load_model(find_checkpoint(str(folder)), "depth_estimator"), estimator)
        )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [(512, 512), (512, 768), (96, 40)])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("multiple", [1, 32])
def test_pictures_are_brought_to_the_size_that_transformers_takes(
    size: tuple[int, int], keep: bool, multiple: int
) -> None:
    wanted = get_resize_output_image_size(
        np.empty((3, *size)), (384, 384), keep_aspect_ratio=keep, multiple=multiple
    )
    processor = {
        "size": {"height": 384, "width": 384},
        "keep_aspect_ratio": keep,
        "ensure_multiple_of": multiple,
    }
    assert _resized(size, processor) == (wanted.height, wanted.width)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"in_channels": 4}, "its UNet sees no depth"),
        ("model_index.json", {"depth_estimator": [None, None]}, "its depth estimator is missing"),
        ("depth_estimator/config.json", {"model_type": "glpn"}, "of the kind glpn, not dpt"),
    ],
)
def test_what_is_half_for_depth(
    hybrid: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = changed(hybrid, tmp_path / "half", file, changes)
    with pytest.raises(ExportError, match=message):
        find_checkpoint(str(folder))


def test_a_missing_estimator_is_named(hybrid: Path, tmp_path: Path) -> None:
    shutil.copytree(hybrid, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "depth_estimator")
    with pytest.raises(ExportError, match="names a depth_estimator"):
        find_checkpoint(str(tmp_path / "copy"))


def test_pictures_are_not_brought_to_an_edge(hybrid: Path, tmp_path: Path) -> None:
    """Nor are they by DPT's processor in transformers; CLIP's does."""
    processor = "feature_extractor/preprocessor_config.json"
    folder = changed(hybrid, tmp_path / "copy", processor, {"size": {"shortest_edge": 32}})
    words = r"^feature_extractor: load: in its preprocessor_config\.json size is .*height and width"
    with pytest.raises(ExportError, match=words):
        find_checkpoint(str(folder))


def test_an_estimator_that_cannot_look(hybrid: Path, tmp_path: Path) -> None:
    processor = "feature_extractor/preprocessor_config.json"
    folder = changed(hybrid, tmp_path / "copy", processor, {"size": 48})
    found = find_checkpoint(str(folder))
    images = np.zeros((1, 24, 24, 3), np.float32)
    with pytest.raises(ExportError, match=r"pictures of 24×24 .height × width.: Input") as caught:
        depth_mask(found, make_estimator(HYBRID), images, vae_scale_factor=1)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--controlnet", "."], "made for depth to image"),
        (["--feature-cache"], "sees more than latents"),
    ],
)
def test_what_does_not_go_with_depth(
    hybrid: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    output = tmp_path / "bundle"
    assert main(["--model", str(hybrid), "--output", str(output), *options]) in (2, 5)
    assert message in capsys.readouterr().err
    assert not output.exists()
