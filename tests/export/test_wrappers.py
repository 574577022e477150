"""What is traced gives the contract's border and the libraries' own numbers."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from sd_engines.spec import Profile, TensorSpec
from sd_export.borders import borders
from sd_export.load import load_model
from sd_export.onnx_export import trace
from sd_export.oracle import nsfw_content_detected
from sd_export.preview_vae import with_preview_vae
from sd_export.safety_checker import SafetyChecker
from sd_export.source import find_checkpoint
from sd_export.verify import RELATIVE_L2, probe_inputs, reference_outputs, relative_l2
from sd_export.wrappers import COMPONENTS, MODEL_OF, wrap
from tiny import make_tiny_vae

if TYPE_CHECKING:
    from pathlib import Path

PROFILE = Profile(batch_size=1, height=64, width=64, vae_scale_factor=8)


# What the checkpoint has: exports of others and with a tiny decoder prove the borders of these.
ELSEWHERE = ("text_encoder_2", "image_encoder", "preview_decoder", "depth_estimator")


@pytest.mark.parametrize("component", [c for c in COMPONENTS if c not in ELSEWHERE])
def test_outputs_are_what_the_border_says(checkpoint: Path, component: str) -> None:
    found = find_checkpoint(str(checkpoint))
    model = load_model(found, MODEL_OF.get(component, component))
    module = wrap(component, model, checkpoint=found, profile=PROFILE)
    inputs, outputs = borders(component, checkpoint=found, profile=PROFILE)
    rows = 3
    arguments = [
        torch.zeros([rows, *(int(s) for s in spec.shape[1:])], dtype=getattr(torch, spec.dtype))
        for spec in inputs
    ]
    with torch.no_grad():
        results = module(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    for spec, result in zip(outputs, results, strict=True):
        assert tuple(result.shape) == (rows, *spec.shape[1:])
        assert result.dtype == getattr(torch, spec.dtype)


@pytest.mark.parametrize("component", ["unet", "vae_decoder"])
def test_is_followed_once(
    checkpoint: Path, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upsampling 64 rows or more goes another way: a wider batch, and torch starts once more."""
    calls = []
    export = torch.export.export

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(component)
        return export(*arguments, **options)

    monkeypatch.setattr(torch.export, "export", counted)
    found = find_checkpoint(str(checkpoint))
    model = load_model(found, MODEL_OF.get(component, component))
    module = wrap(component, model, checkpoint=found, profile=PROFILE)
    inputs, outputs = borders(component, checkpoint=found, profile=PROFILE)
    trace(module, component=component, inputs=inputs, outputs=outputs)
    assert calls == [component]


def test_operators_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes its table for every graph; ours, made once, gives the graph it gave before."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    spec = TensorSpec("sample", "float32", ("batch", 4, 8, 8))
    border = {"inputs": [spec], "outputs": [replace(spec, name="noise_pred")]}
    module = torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.SiLU()).eval()

    def graph() -> bytes:
        model = ir.to_proto(trace(module, component="unet", **border))
        return model.SerializeToString(deterministic=True)

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, ONNXRegistry.__module__, None)  # as where there is none
        expected = graph()
    assert graph() == expected
    own = vars(ONNXRegistry)["from_torchlib"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the table is made again")

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", refuse)
    assert graph() == expected
    monkeypatch.undo()
    assert vars(ONNXRegistry)["from_torchlib"] is own


def test_vae_scales_and_permutes_as_the_pipeline_does(checkpoint: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor

    found = find_checkpoint(str(checkpoint))
    vae = load_model(found, "vae")
    rng = np.random.default_rng(0)
    latents = torch.from_numpy(rng.standard_normal((2, 4, 8, 8), dtype=np.float32))
    decoder = wrap("vae_decoder", vae, checkpoint=found, profile=PROFILE)
    encoder = wrap("vae_encoder", vae, checkpoint=found, profile=PROFILE)
    with torch.no_grad():
        images = vae.decode(latents / vae.config.scaling_factor).sample
        expected = VaeImageProcessor().postprocess(images, output_type="np")
        assert np.array_equal(decoder(latents).numpy(), expected)
        pictures = VaeImageProcessor.numpy_to_pil(expected)
        posterior = vae.encode(VaeImageProcessor().preprocess(pictures)).latent_dist
        pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]) / np.float32(255))
        mean, std = encoder(pixels)
    torch.testing.assert_close(mean, posterior.mean * vae.config.scaling_factor)
    torch.testing.assert_close(std, posterior.std * vae.config.scaling_factor)


@pytest.mark.parametrize("component", ["vae_decoder", "preview_decoder", "vae_encoder"])
def test_a_wrapper_is_not_its_own_reference(
    checkpoint: Path, tmp_path: Path, component: str
) -> None:
    """One that hands its VAE something else than a pipeline does differs from what is proven."""
    tiny = make_tiny_vae(tmp_path / "tiny", levels=4)
    found = with_preview_vae(find_checkpoint(str(checkpoint)), str(tiny))
    model = load_model(found, MODEL_OF[component])
    right = wrap(component, model, checkpoint=found, profile=PROFILE)

    class Wrong(torch.nn.Module):
        def forward(self, tensor: torch.Tensor) -> Any:
            return right(tensor * 0.5)

    inputs, outputs = borders(component, checkpoint=found, profile=PROFILE)
    probe = probe_inputs(component, inputs, profile=PROFILE, vocab_size=0)
    reference = reference_outputs(Wrong(), component, probe, outputs, checkpoint=found, model=model)
    (tensor,) = (torch.from_numpy(array) for array in probe.values())
    for module, agrees in ((right, True), (Wrong(), False)):
        with torch.no_grad():
            results = module(tensor)
        results = results if isinstance(results, tuple) else (results,)
        for spec, result in zip(outputs, results, strict=True):
            figure = relative_l2(result.numpy(), reference[spec.name])
            assert (figure < RELATIVE_L2["fp32"]) == agrees


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (128, 72)])
def test_safety_checker_finds_what_diffusers_finds(
    checkpoint: Path, height: int, width: int
) -> None:
    found = find_checkpoint(str(checkpoint))
    checker = load_model(found, "safety_checker")
    processor = found.configs["feature_extractor"]
    module = SafetyChecker(checker, processor=processor, height=height, width=width)
    rng = np.random.default_rng(1)
    rows, columns = np.arange(height) * 6 // height, np.arange(width) * 6 // width
    coarse = rng.random((64, 6, 6, 3), dtype=np.float32)
    images = coarse[:, rows][:, :, columns]
    expected = nsfw_content_detected(found, checker, images)
    assert 8 <= expected.sum() <= 56  # both answers occur
    with torch.no_grad():
        answers = module(torch.from_numpy(images)).numpy()
    assert (answers == expected).mean() >= 63 / 64  # one may lie on a threshold
