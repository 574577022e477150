"""The UNet in 8 bits: calibrated by the bundle's own pictures, labelled, taken only when asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import sd_export
from sd_engines.bundle import open_bundle
from sd_engines.engine import listed_engines
from sd_engines.errors import ConfigError
from sd_engines.spec import Defaults
from sd_export import precision
from sd_export.calibration import PROMPTS, Calibration
from sd_export.cli import main
from sd_runtime import Pipeline, Request
from sd_runtime.cli import main as sd_run
from stops import Stop, stop_at
from tiny_onnx import needs
from tiny_xl import make_xl_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sd_engines.bundle import Bundle
    from sd_engines.spec import Precision
    from sd_export import ExportReport
    from sd_export.progress import StageEvent

needs("nncf")  # importorskip would import it, and with it its telemetry
needs("openvino")
BUILD = ("--backend", "openvino", "--precision", "int8")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle on the left\na cat\na dog\n")
    return path


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the command that made ``bundle`` said on stdout."""
    return []


@pytest.fixture(scope="module")
def bundle(
    report: ExportReport,
    prompts: Path,
    said: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """``report``'s bundle with an int8 UNet beside the exact ones."""
    import contextlib
    import io

    path = shutil.copytree(report.path, tmp_path_factory.mktemp("int8") / "bundle")
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        code = main(["build", str(path), *BUILD, "--calibration-prompts", str(prompts)])
    assert code == 0
    said.append(stdout.getvalue())
    return path


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Stable Diffusion XL."""
    return make_xl_checkpoint(tmp_path_factory.mktemp("xl") / "tiny", block_out_channels=(16,))


@pytest.fixture(scope="module")
def xl_report(xl: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """``xl`` with an int8 UNet alone."""
    return sd_export.export(
        xl,
        tmp_path_factory.mktemp("int8") / "bundle",
        backends=("openvino",),
        precision="int8",
        calibration_prompts=prompts.read_text().splitlines(),
    )


def test_it_is_added_beside_the_exact_engines(
    bundle: Path, report: ExportReport, said: list[str]
) -> None:
    assert said == [f"{bundle}\n"]
    opened = open_bundle(bundle)
    opened.verify()
    old, new = report.manifest, opened.manifest
    assert new.components == old.components
    assert new.engines[:-1] == old.engines
    engine = new.engines[-1]
    assert (engine.component, engine.backend, engine.precision) == ("unet", "openvino", "int8")
    assert engine.file == f"engines/openvino-{engine.version}-cpu/unet.engine"
    assert engine.flags.keys() == {"calibration", "nncf", "rest"}
    assert opened.verified_engine(engine) == bundle / engine.file
    graph = sum(file.bytes for file in new.components["unet"].files.values())
    assert engine.bytes < 0.7 * graph  # tiny as it is: the XML alone is a third
    (measured,) = (c for c in new.certificate if c not in old.certificate)
    assert (measured.component, measured.precision) == ("unet", "int8")
    assert 1e-3 < measured.figure < measured.tolerance
    assert measured.reference.startswith("the bundle's ONNX, fp32")
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_nobody_gets_it_who_did_not_ask(bundle: Path) -> None:
    assert "int8" not in {e.precision for e in listed_engines(open_bundle(bundle), "unet")}
    for backend in ("auto", "openvino"):
        with Pipeline.load(bundle, backend=backend, threads=1) as pipeline:
            assert pipeline.engines["unet"].precision == "fp32"


def test_it_draws_nearly_the_same_picture(bundle: Path) -> None:
    request = Request("a blue square", seed=5, num_inference_steps=4)
    latents = {}
    for name in ("fp32", "int8"):
        with Pipeline.load(bundle, backend="openvino", precision=name) as pipeline:  # type: ignore[arg-type]
            result = pipeline.generate(request)
            engines = pipeline.engines
        assert engines["unet"].precision == name
        assert engines["vae_decoder"].precision == "fp32"
        assert result.recipes[0].precision == name
        latents[name] = result.latents
    difference = np.linalg.norm(latents["int8"] - latents["fp32"])
    assert 1e-3 < difference / np.linalg.norm(latents["fp32"]) < 0.3


def test_its_pictures_are_drawn_again_by_it(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = str(tmp_path / "first.png"), str(tmp_path / "again.png")
    options = ["--seed", "3", "--num-inference-steps", "2", "--json", "--quiet", "--output"]
    assert sd_run([str(bundle), "a cat", "--precision", "int8", *options, first]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "int8"
    arguments = [str(bundle), "--from-image", first, "--json", "--quiet", "--output", again]
    assert sd_run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "int8"
    assert np.array_equal(Image.open(first), Image.open(again))
    assert sd_run([str(bundle), "a cat", "--precision", "int9", *options, again]) == 2
    assert "unknown precision 'int9'" in capsys.readouterr().err


def test_it_is_made_again_only_for_other_prompts(bundle: Path, prompts: Path) -> None:
    before = (bundle / "bundle.json").read_bytes()
    events: list[StageEvent] = []
    progress = stop_at("unet", "calibrate", events=events)
    lines = prompts.read_text().splitlines()
    options = {"backends": ("openvino",), "precision": "int8", "progress": progress}
    sd_export.build(bundle, calibration_prompts=lines, **options)  # type: ignore[arg-type]
    skipped = {e.component for e in events if e.detail == "already there"}
    assert "unet" in skipped
    with pytest.raises(Stop):
        sd_export.build(bundle, **options)  # type: ignore[arg-type]
    assert (bundle / "bundle.json").read_bytes() == before


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' Euler, of numpy
@pytest.mark.parametrize("family", ["v1", "xl"])
def test_calibration_follows_the_sampler(
    family: str, report: ExportReport, checkpoint: Path, xl: Path, xl_report: ExportReport
) -> None:
    """Trajectories of diffusers' own pipeline: the UNet there is asked the same."""
    import torch
    from diffusers import DiffusionPipeline

    if family == "xl":
        report, checkpoint = xl_report, xl
    prompts = ["a red circle", "a cat", "a dog"]
    calibration = Calibration.of(report.path, report.manifest, prompts)
    inputs, proof = calibration.draw()
    options = {"add_watermarker": False} if family == "xl" else {"safety_checker": None}
    oracle = DiffusionPipeline.from_pretrained(checkpoint, **options)
    oracle.set_progress_bar_config(disable=True)
    asked: list[dict[str, np.ndarray]] = []
    pictures = 2 if family == "xl" else 1  # v1's both halves are of one picture

    def keep(_module: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        added = options["added_cond_kwargs"] or {}
        names = {"text_embeds": "pooled_prompt_embeds", "time_ids": "time_ids"}
        asked.append(
            {
                "sample": arguments[0][:pictures].numpy().copy(),
                "timestep": np.full(pictures, float(arguments[1]), np.float32),
                "encoder_hidden_states": options["encoder_hidden_states"].numpy().copy(),
                **{names[theirs]: tensor.numpy().copy() for theirs, tensor in added.items()},
            }
        )

    oracle.unet.register_forward_pre_hook(keep, with_kwargs=True)
    for index, prompt in enumerate([*prompts, "a red circle on a white background"]):
        oracle(
            prompt,
            num_inference_steps=8,
            guidance_scale=3.0,
            generator=torch.Generator("cpu").manual_seed(20_220_822 + index),
            output_type="latent",
        )
    rows = len(asked) // 4
    every = rows // 3
    kept = [asked[p * rows + r] for p in range(3) for r in range(rows) if (r + p) % every == 0]
    assert len(inputs) == len(kept)
    for found, wanted in zip(inputs, kept, strict=True):
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
    held_out = np.concatenate([step["sample"] for step in asked[3 * rows :]])
    np.testing.assert_allclose(proof.inputs["sample"], held_out, rtol=1e-3, atol=1e-4)
    assert proof.reference["noise_pred"].shape == (2 * rows, *held_out.shape[1:])


def test_calibration_asks_for_no_more_than_the_checkpoint_takes(report: ExportReport) -> None:
    """One of few steps and no guidance is never run on two rows, nor past its last step."""
    model = replace(report.manifest.model, defaults=Defaults(2, 1.0))
    distilled = replace(report.manifest, model=model)
    inputs, proof = Calibration.of(report.path, distilled, ["a cat"]).draw()
    assert len(inputs) == len(proof.inputs["timestep"]) == 3  # PNDM's two steps are three rows
    assert {len(step["sample"]) for step in inputs} == {1}


def test_calibration_is_known_by_its_prompts(report: ExportReport) -> None:
    def digest(prompts: Sequence[str] | None) -> str:
        return Calibration.of(report.path, report.manifest, prompts).digest

    assert len(PROMPTS) == len(set(PROMPTS))
    assert digest(None) == digest(PROMPTS)
    assert digest(None) != digest(PROMPTS[1:])


def test_a_bundle_of_nothing_else(xl_report: ExportReport) -> None:
    rows = {c.component: c for c in xl_report.manifest.certificate}
    assert rows["unet"].reference.endswith("along a picture")
    assert rows["end_to_end"].reference.startswith("diffusers")
    assert {name: row.precision for name, row in rows.items()} == {
        "text_encoder": "fp32",
        "text_encoder_2": "fp32",
        "unet": "int8",
        "vae_decoder": "fp32",
        "vae_encoder": "fp32",
        "end_to_end": "int8",
    }
    assert 1e-3 < rows["unet"].figure < rows["unet"].tolerance
    with Pipeline.load(xl_report.path) as pipeline:
        assert pipeline.engines["unet"].precision == "int8"
    assert [p.name for p in xl_report.path.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        ({"backends": ("onnxruntime",)}, "int8 is for OpenVINO, not for onnxruntime", "openvino"),
        ({"backends": ("openvino", "tensorrt-rtx")}, "not for tensorrt-rtx", "sd-export build"),
        ({"precision": None, "calibration_prompts": ["a cat"]}, "are for --precision int8", "add"),
        ({"calibration_prompts": []}, "at least one of them", "--calibration-prompts"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    tmp_path: Path, options: dict[str, object], words: str, hint: str
) -> None:
    asked = {"backends": ("openvino",), "precision": "int8", **options}
    for command in (
        lambda: sd_export.export("./nowhere", tmp_path / "bundle", **asked),  # type: ignore[arg-type]
        lambda: sd_export.build(tmp_path / "bundle", **asked),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            command()
        assert hint in caught.value.hint
    assert not any(tmp_path.iterdir())


def test_a_unet_that_is_fed_a_mask_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"in_channels": 9}))
    with pytest.raises(ConfigError, match="takes a picture") as caught:
        sd_export.export(folder, tmp_path / "bundle", backends=("openvino",), precision="int8")
    assert "bf16" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_refiner_is_refused(tmp_path: Path) -> None:
    refiner = make_xl_checkpoint(tmp_path / "tiny", refiner=True, block_out_channels=(16,))
    with pytest.raises(ConfigError, match="takes a picture") as caught:
        sd_export.export(refiner, tmp_path / "bundle", backends=("openvino",), precision="int8")
    assert "bf16" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_a_refiner_is_known_by_its_inputs(xl_report: ExportReport) -> None:
    entry = xl_report.manifest.components["unet"]
    scored = [replace(s, shape=("batch", 5)) if s.name == "time_ids" else s for s in entry.inputs]
    entry = replace(entry, inputs=tuple(scored))
    with pytest.raises(ConfigError, match="takes a picture"):
        precision.engine_precision("unet", "openvino", entry=entry, precision="int8")


def test_a_unet_that_caches_is_refused(smallest: Path, cached_bundle: Path, tmp_path: Path) -> None:
    asked = {"backends": ("openvino",), "precision": "int8"}
    before = (cached_bundle / "bundle.json").read_bytes()
    for command in (
        lambda: sd_export.export(smallest, tmp_path / "b", feature_cache=True, **asked),  # type: ignore[arg-type]
        lambda: sd_export.build(cached_bundle, **asked),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match="caches its features") as caught:
            command()
        assert "without --feature-cache" in caught.value.hint
    assert (cached_bundle / "bundle.json").read_bytes() == before
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("graph", ["fp16", "bf16"])
def test_a_graph_in_half_precision_is_refused(report: ExportReport, graph: Precision) -> None:
    entry = replace(report.manifest.components["unet"], precision=graph)
    with pytest.raises(ConfigError, match=f"unet is {graph}; int8 cannot") as caught:
        precision.engine_precision("unet", "openvino", entry=entry, precision="int8")
    assert "--precision int8" in caught.value.hint


QUANTIZE = """
import sys
from pathlib import Path
from sd_export.int8 import _quantized
from tiny_onnx import unet_arrays
_quantized(Path(sys.argv[1]), "unet", [unet_arrays(2)])
"""


def test_nothing_is_told_to_anybody(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """NNCF writes an identifier for its telemetry into HOME, unless stopped."""
    home = tmp_path / "home"
    home.mkdir()
    graph = tiny_bundle.path / tiny_bundle.manifest.components["unet"].file
    quiet = {name: value for name, value in os.environ.items() if name != "CI"}
    subprocess.run(
        [sys.executable, "-c", QUANTIZE, str(graph)],
        env={**quiet, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])},
        check=True,
    )
    assert list(home.rglob("*")) == []


def test_without_nncf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package nncf") as caught:
        sd_export.export("x", tmp_path / "bundle", backends=("openvino",), precision="int8")
    assert caught.value.hint == 'pip install "sd-toolkit[int8]"'


def test_a_target_that_openvino_has_not(bundle: Path) -> None:
    before = (bundle / "bundle.json").read_bytes()
    with pytest.raises(ConfigError, match="unknown target 'gpu'"):
        sd_export.build(bundle, backends=("openvino",), precision="int8", target="gpu")
    assert (bundle / "bundle.json").read_bytes() == before


def test_a_file_of_prompts_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, words in (("nowhere.txt", "cannot read"), ("empty.txt", "holds no prompts")):
        arguments = ["build", "b", *BUILD, "--calibration-prompts", str(tmp_path / name)]
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
