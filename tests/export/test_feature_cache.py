"""The shallow UNet against the unmodified one, and the bundle that holds both."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import sd_export
from deep_cache import deep_features_kept
from sd_engines.bundle import hash_files, open_bundle
from sd_engines.engine import build_engine, load_engine
from sd_engines.entries import ComponentEntry
from sd_engines.errors import ExportError
from sd_engines.spec import Profile
from sd_export.borders import borders
from sd_export.load import load_model
from sd_export.onnx_export import OPSET, save, trace
from sd_export.shallow_unet import shallow_reference
from sd_export.source import find_checkpoint
from sd_export.wrappers import wrap
from tiny_xl import make_xl_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from sd_export.checkpoint import Checkpoint

PROFILE = Profile(batch_size=1, height=64, width=64, vae_scale_factor=8)
TIMESTEPS = torch.tensor([981.0, 21.0])


@pytest.fixture(scope="module", params=["CrossAttnUpBlock2D", "UpBlock2D", "XL", "refiner"])
def found(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    smallest: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Checkpoint:
    """Checkpoints whose UNets end in blocks with and without attention; two are of XL."""
    if request.param in ("XL", "refiner"):
        folder = tmp_path_factory.mktemp("xl") / request.param
        path = make_xl_checkpoint(folder, refiner=request.param == "refiner", layers_per_block=2)
        return find_checkpoint(str(path))
    found = find_checkpoint(str(checkpoint if request.param == "CrossAttnUpBlock2D" else smallest))
    assert found.configs["unet"]["up_block_types"][-1] == request.param
    return found


@pytest.fixture(scope="module")
def unet(found: Checkpoint) -> Any:
    return load_model(found, "unet")


def arguments(found: Checkpoint, component: str) -> dict[str, torch.Tensor]:
    """Random inputs of two rows, by name."""
    draw = torch.Generator().manual_seed(len(component))
    inputs, _ = borders(component, checkpoint=found, profile=PROFILE)
    shapes = {spec.name: [2, *(int(size) for size in spec.shape[1:])] for spec in inputs}
    random = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return {**random, "timestep": TIMESTEPS}


def noise_pred_of(unet: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What diffusers' own UNet makes of its inputs by name, deep features aside."""
    added = {"text_embeds": "pooled_prompt_embeds", "time_ids": "time_ids"}
    told = {theirs: given[ours] for theirs, ours in added.items() if ours in given}
    names = ("sample", "timestep", "encoder_hidden_states")
    noise_pred: torch.Tensor = unet(*(given[n] for n in names), added_cond_kwargs=told).sample
    return noise_pred


def test_both_parts_make_up_the_whole(found: Checkpoint, unet: Any) -> None:
    cached = wrap("unet", unet, checkpoint=found, profile=PROFILE, feature_cache=True)
    shallow = wrap("unet_shallow", unet, checkpoint=found, profile=PROFILE)
    given = arguments(found, "unet")
    with torch.no_grad():
        expected = noise_pred_of(unet, given)
        noise_pred, deep_features = cached(*given.values())
        wanted = arguments(found, "unet_shallow") | given | {"deep_features": deep_features}
        again = shallow(*(wanted[name] for name in arguments(found, "unet_shallow")))
    assert torch.equal(noise_pred, expected)
    assert torch.equal(again, expected)


def test_the_graph_gives_what_diffusers_gives_on_kept_features(
    found: Checkpoint, unet: Any, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra sd-toolkit[cpu]")
    first, second = arguments(found, "unet"), arguments(found, "unet_shallow")
    with torch.no_grad(), deep_features_kept(unet, interval=2) as own:
        noise_pred_of(unet, first)
        expected = noise_pred_of(unet, first | second)
    assert own == [True, False]
    with torch.no_grad():
        cached = wrap("unet", unet, checkpoint=found, profile=PROFILE, feature_cache=True)
        second["deep_features"] = cached(*first.values())[1]
        reference = shallow_reference(unet, second)
    torch.testing.assert_close(reference, expected)

    inputs, outputs = borders("unet_shallow", checkpoint=found, profile=PROFILE)
    module = wrap("unet_shallow", unet, checkpoint=found, profile=PROFILE)
    graph = trace(module, component="unet_shallow", inputs=inputs, outputs=outputs)
    weights = sum(weight.const_value.nbytes for weight in graph.graph.initializers.values())
    assert weights < 4 * sum(parameter.numel() for parameter in unet.parameters())
    save(graph, tmp_path / "unet_shallow")
    file = "unet_shallow/model.onnx"
    entry = ComponentEntry(
        file=file,
        files=hash_files(tmp_path, [file, file + "_data"]),
        precision="fp32",
        opset=OPSET,
        inputs=inputs,
        outputs=outputs,
    )
    engine = build_engine(
        "onnxruntime",
        tmp_path / file,
        output_dir=tmp_path,
        component="unet_shallow",
        entry=entry,
        profile=PROFILE,
    )
    with load_engine(tmp_path / file, component=entry, engine=engine, max_batch=2) as opened:
        result = opened(**{name: array.numpy() for name, array in second.items()})
    np.testing.assert_allclose(result["noise_pred"], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_bundle_holds_and_proves_both(cached_bundle: Path) -> None:
    bundle = open_bundle(cached_bundle)
    bundle.verify()
    manifest = bundle.manifest
    assert list(manifest.components) == [
        "text_encoder", "unet", "unet_shallow", "vae_decoder", "vae_encoder"
    ]  # fmt: skip
    whole, shallow = manifest.components["unet"], manifest.components["unet_shallow"]
    assert [spec.name for spec in whole.outputs] == ["noise_pred", "deep_features"]
    assert whole.outputs[1] in shallow.inputs
    assert shallow.outputs == whole.outputs[:1]
    rows = {c.backend: c for c in manifest.certificate if c.component == "unet_shallow"}
    assert rows.keys() == {"onnxruntime", "openvino"}
    for row in rows.values():
        assert row.reference.startswith("diffusers ")
        assert 0 < row.figure <= row.tolerance == 1e-4
    assert manifest.profile.max_batch("unet_shallow", shallow.inputs) == 4


def test_tensorrt_rtx_builds_the_shallow_unet(cached_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx package")
    manifest = open_bundle(cached_bundle).manifest
    entry = manifest.components["unet_shallow"]
    engine = build_engine(
        "tensorrt-rtx",
        cached_bundle / entry.file,
        output_dir=tmp_path,
        component="unet_shallow",
        entry=entry,
        profile=manifest.profile,
    )
    assert (tmp_path / engine.file).stat().st_size == engine.bytes > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"up_block_types": ["AttnUpBlock2D"]}, "ends in a AttnUpBlock2D"),
        ({"time_cond_proj_dim": 8}, "too few steps"),
        ({"in_channels": 9}, "sees more than latents"),
    ],
)
def test_a_unet_that_cannot_be_cut_is_refused(
    smallest: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    other = shutil.copytree(smallest, tmp_path / "other")
    path = other / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExportError, match=words) as caught:
        sd_export.export(other, tmp_path / "bundle", feature_cache=True)
    assert "without --feature-cache" in caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]
