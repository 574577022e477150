"""A checkpoint becomes a bundle that is proven, or an error and nothing at all."""

from __future__ import annotations

import gc
import json
import shutil
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_export
from sd_engines.bundle import open_bundle
from sd_engines.errors import ConfigError, ExportError
from sd_export import verify, wrappers
from sd_runtime import Pipeline, Request
from sd_runtime.noise import NoiseStream
from stops import Stop, stop_at

if TYPE_CHECKING:
    from pathlib import Path

    from sd_export import ExportReport
    from sd_export.progress import StageEvent

COMPONENTS = ["text_encoder", "unet", "vae_decoder", "vae_encoder", "safety_checker"]


def test_bundle_is_whole_and_says_what_it_is(report: ExportReport, checkpoint: Path) -> None:
    bundle = open_bundle(report.path)
    bundle.verify()
    manifest = bundle.manifest
    assert manifest == report.manifest
    assert list(manifest.components) == COMPONENTS
    assert manifest.model.source == str(checkpoint)
    assert manifest.model.family == "stable-diffusion-v1"
    assert manifest.model.license == "creativeml-openrail-m"
    assert manifest.model.scheduler["_class_name"] == "PNDMScheduler"
    assert (manifest.profile.height, manifest.profile.width) == (64, 64)
    assert {(e.component, e.backend) for e in manifest.engines} == {
        (component, backend) for component in COMPONENTS for backend in ("onnxruntime", "openvino")
    }
    assert {"torch", "diffusers", "transformers", "onnxruntime"} <= manifest.versions.keys()
    assert sorted(p.name for p in report.path.parent.iterdir()) == ["bundle"]


def test_graphs_have_one_symbolic_axis_and_the_border_of_the_manifest(
    report: ExportReport,
) -> None:
    for component, entry in report.manifest.components.items():
        path = report.path / entry.file
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path, load_external_data=False).graph
        for values, specs in ((graph.input, entry.inputs), (graph.output, entry.outputs)):
            found = [
                (value.name, tuple(d.dim_param or d.dim_value for d in _dims(value)))
                for value in values
            ]
            assert found == [(spec.name, spec.shape) for spec in specs], component
        operators = {node.op_type for node in graph.node}
        own = {"model.onnxruntime.onnx"} if "GroupNormalization" in operators else set()
        assert {p.name for p in path.parent.iterdir()} == {
            "layers.json",
            "model.onnx",
            "model.onnx_data",
            *own,
        }
        assert "Attention" in operators, component


def _dims(value: onnx.ValueInfoProto) -> list[onnx.TensorShapeProto.Dimension]:
    return list(value.type.tensor_type.shape.dim)


def test_certificate_has_every_component_and_the_whole(report: ExportReport) -> None:
    rows = {(c.component, c.backend): c for c in report.manifest.certificate}
    for backend in ("onnxruntime", "openvino"):
        for component in COMPONENTS[:4]:
            row = rows[component, backend]
            assert row.metric == "relative_l2"
            assert 0 < row.figure <= row.tolerance == 1e-4
            assert row.reference.startswith("diffusers ")
        assert rows["safety_checker", backend].figure == 1.0
        assert rows["end_to_end", backend].metric == "pixels_within_1"
        assert rows["end_to_end", backend].figure >= 0.999


def test_runtime_draws_what_diffusers_draws(report: ExportReport, checkpoint: Path) -> None:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        checkpoint, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a blue square",
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images.numpy()
    with Pipeline.load(report.path, backend="onnxruntime") as drawn:
        result = drawn.generate(Request(prompt="a blue square", seed=5, num_inference_steps=4))
    error = np.linalg.norm(result.latents - expected) / np.linalg.norm(expected)
    assert error < 1e-4


def test_license_and_card_travel(report: ExportReport, checkpoint: Path) -> None:
    text = (report.path / "LICENSE.md").read_text()
    assert "CreativeML Open RAIL-M" in text
    assert "huggingface.co/spaces/CompVis/stable-diffusion-license" in text
    card = (report.path / "MODEL_CARD.md").read_text()
    assert card == (checkpoint / "README.md").read_text()
    assert "CreativeML Open RAIL-M" in report.license


def test_record_says_time_and_memory_of_every_stage(report: ExportReport) -> None:
    record = json.loads((report.path / "export.json").read_text())
    stages = {(s["component"], s["stage"]): s for s in record["stages"]}
    assert stages["unet", "trace"]["seconds"] > 0
    assert stages["unet", "save"]["bytes"] > 1_000_000
    peaks = [stage["peak_bytes"] for stage in record["stages"] if stage["state"] == "done"]
    assert 10_000_000 < peaks[0] <= peaks[-1] <= record["peak_bytes"] <= report.peak_bytes


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what gc looks at, not of ours
def test_no_weights_outlive_their_graph(
    smallest: Path, tmp_path: Path, precision: Literal["fp32", "fp16"]
) -> None:
    before = torch_bytes()
    stored = (smallest / "unet").glob("*.safetensors")
    with pytest.raises(Stop):  # once the largest graph is saved
        sd_export.export(
            smallest,
            tmp_path / "bundle",
            precision=precision,
            progress=stop_at("unet", "verify onnxruntime"),
        )
    assert torch_bytes() - before < 0.1 * sum(path.stat().st_size for path in stored)


def torch_bytes() -> int:
    """What all tensors that Python knows of hold."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_a_rerun_finds_the_work_done_and_a_change_is_noticed(
    report: ExportReport, checkpoint: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(report.path, tmp_path / "bundle")
    both = ("onnxruntime", "openvino")
    again = sd_export.export(checkpoint, bundle, backends=both)
    assert again.was_done
    assert again.manifest == report.manifest
    with pytest.raises(Stop):  # asked for something else
        sd_export.export(
            checkpoint, bundle, backends=both, height=72, progress=stop_at("text_encoder", "load")
        )
    weights = bundle / "unet/model.onnx_data"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    with pytest.raises(Stop):  # one bit changed
        sd_export.export(
            checkpoint, bundle, backends=both, progress=stop_at("text_encoder", "load")
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle"]


def nothing_left(folder: Path) -> bool:
    return not any(folder.iterdir())


def test_a_bundle_that_misses_its_tolerance_is_not_sealed(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(verify.RELATIVE_L2, "fp32", 1e-12)
    with pytest.raises(ExportError, match="text_encoder: verify: relative_l2") as caught:
        sd_export.export(smallest, tmp_path / "deep" / "bundle")
    assert caught.value.component == "text_encoder"
    assert nothing_left(tmp_path)


def test_a_wrapper_that_leaves_its_model_is_refused(
    smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No picture at the end tells of the encoder: a checkpoint for text draws without it."""
    right = wrappers.VaeEncoder.forward
    monkeypatch.setattr(wrappers.VaeEncoder, "forward", lambda self, seen: right(self, seen * 0.5))
    with pytest.raises(ExportError, match="vae_encoder: verify: relative_l2"):
        sd_export.export(smallest, tmp_path / "bundle")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("precision", "words"),
    [("fp32", "pixels_within_1 is 0"), ("fp16", "relative_l2 is 0.2")],
)
def test_a_picture_that_is_not_diffusers_is_refused(
    smallest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Literal["fp32", "fp16"],
    words: str,
) -> None:
    """Though every component is right."""
    right = NoiseStream.normal
    monkeypatch.setattr(NoiseStream, "normal", lambda self, shape: right(self, shape) * 1.25)
    with pytest.raises(ExportError, match=f"end_to_end: verify: {words}"):
        sd_export.export(smallest, tmp_path / "bundle", precision=precision)
    assert nothing_left(tmp_path)


def test_weights_that_overflow_are_found_by_the_reference(smallest: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(smallest, tmp_path / "broken")
    path = broken / "text_encoder/model.safetensors"
    state = load_file(path)
    for name in state:
        if name.endswith("fc1.weight"):
            state[name] = torch.full_like(state[name], 3e38)
    path.unlink()
    save_file(state, path)
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="the original model itself"):
        sd_export.export(broken, tmp_path / "out" / "bundle")
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backends": ("onnxruntme",)}, "unknown backend"),
        ({"backends": ()}, "no backend"),
        ({"precision": "fp7"}, "unknown precision"),
        ({"precision": "bf16"}, "does not compute in bf16"),
        ({"height": 0}, "--height 0"),
        ({"width": 100_000}, "--width 100000"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"revision": "main"}, "--revision"),
        ({"prediction_type": "epsilon"}, "is for single files"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 1001}, "1001 is out of range"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    smallest: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        sd_export.export(smallest, tmp_path / "bundle", **options)  # type: ignore[arg-type]
    assert caught.value.hint
    assert nothing_left(tmp_path)


def test_sizes_off_the_grid_name_the_nearest(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--height 100") as caught:
        sd_export.export(checkpoint, tmp_path / "bundle", height=100)
    assert "the nearest is 96" in caught.value.hint


def test_what_is_no_bundle_is_not_replaced(smallest: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    for target in (tmp_path / "home", tmp_path / "home/thesis.txt"):
        with pytest.raises(ConfigError, match="is no bundle"):
            sd_export.export(smallest, target)
    assert (tmp_path / "home/thesis.txt").read_text() == "years of work"


def test_an_unwritable_target_is_an_error(smallest: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "bundle", "/proc/nowhere/bundle"):
        with pytest.raises(ExportError, match="cannot be written") as caught:
            sd_export.export(smallest, target)
        assert caught.value.hint.startswith("Name a place that can be written to")


def test_a_tokenizer_of_another_model_is_refused(smallest: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(smallest, tmp_path / "mixed")
    config = json.loads((mixed / "text_encoder/config.json").read_text())
    (mixed / "text_encoder/config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(ExportError, match="the text encoder knows 300"):
        sd_export.export(mixed, tmp_path / "bundle")


def test_a_checkpoint_that_changes_meanwhile_is_refused(smallest: Path, tmp_path: Path) -> None:
    growing = shutil.copytree(smallest, tmp_path / "growing")

    def progress(event: StageEvent) -> None:
        if (event.component, event.stage, event.state) == ("text_encoder", "load", "started"):
            path = growing / "unet/diffusion_pytorch_model.safetensors"
            path.write_bytes(path.read_bytes())

    with pytest.raises(ExportError, match="changed while they were being read"):
        sd_export.export(growing, tmp_path / "bundle", progress=progress)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["growing"]


def test_a_scheduler_config_is_corrected_as_diffusers_corrects_it(
    report_of_2022: ExportReport,
) -> None:
    """Its picture was proven against that of diffusers' pipeline."""
    certificate = report_of_2022.manifest.certificate
    assert [e.metric for e in certificate if e.component == "end_to_end"]
