"""One bundle for several sizes of pictures: weights once, and engines for each."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

import sd_export
from sd_engines.bundle import open_bundle
from sd_export.cli import main
from sd_export.onnx_export import external_places
from sd_runtime import Pipeline, Request
from sd_runtime.layer_table import LayerTable

if TYPE_CHECKING:
    from pathlib import Path


def test_weights_are_stored_once(sizes_bundle: Path) -> None:
    manifest = open_bundle(sizes_bundle).manifest
    own, *others = manifest.all_sizes
    assert [(s.profile.height, s.profile.width) for s in others] == [(16, 24), (24, 8)]
    for size in others:
        ending = f"-{size.profile.width}x{size.profile.height}.onnx"
        assert size.components["text_encoder"] == own.components["text_encoder"]
        for name in ("unet", "vae_decoder", "vae_encoder"):
            entry = size.components[name]
            assert entry.file == f"{name}/model{ending}"
            apart = sum(f.bytes for n, f in entry.files.items() if n.endswith(f"{ending}_data"))
            assert apart < 1024  # shapes
            places = external_places(sizes_bundle / entry.file)
            shared = {n for n, p in places.items() if p["location"] == "model.onnx_data"}
            weights = {n for n in places if "weight" in n}
            assert weights <= shared
            assert len(weights) > 5


def test_a_lora_finds_the_same_weights(sizes_bundle: Path) -> None:
    opened = open_bundle(sizes_bundle)
    own, other = (LayerTable.open(b, "unet") for b in (opened, opened.at(16, 24)))
    assert own.layers.keys() == other.layers.keys()
    assert all(np.array_equal(own.read(name), other.read(name)) for name in own.layers)


def test_each_is_proven(sizes_bundle: Path) -> None:
    open_bundle(sizes_bundle).verify()
    for size in open_bundle(sizes_bundle).manifest.all_sizes:
        measured = {entry.component: entry for entry in size.certificate}
        assert measured.keys() == {*size.components, "end_to_end"}
        assert measured["end_to_end"].figure >= 0.999


def test_engines_added_later_are_for_all(sizes_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(sizes_bundle, tmp_path / "bundle")
    manifest = sd_export.build(bundle, backends=["openvino"])
    for size in manifest.all_sizes:
        engines = [engine for engine in size.engines if engine.backend == "openvino"]
        assert {engine.component for engine in engines} == size.components.keys()
        assert {engine.file for engine in engines} == {c.file for c in size.components.values()}
    request = Request("a red circle", seed=1, num_inference_steps=2, height=24, width=8)
    with Pipeline.load(bundle, backend="openvino", threads=1) as pipeline:
        drawn = pipeline.generate(request).pixels
        pipeline.generate(Request("a red circle", seed=1, num_inference_steps=2))
        again = pipeline.generate(request).pixels
    with Pipeline.load(bundle, backend="onnxruntime", threads=1, request=request) as pipeline:
        other = pipeline.generate(request).pixels
    assert drawn.shape == (1, 24, 8, 3)
    assert np.array_equal(again, drawn)
    assert (np.abs(other.astype(int) - drawn) <= 1).mean() >= 0.999


def test_the_same_again_is_done(sizes_bundle: Path, smallest: Path) -> None:
    report = sd_export.export(smallest, sizes_bundle, sizes=[(16, 24), (24, 8)])
    assert report.was_done


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("wide", "--size 'wide' is no size"),
        ("16x", "--size '16x' is no size"),
        ("8x9000", "--size 8x9000, its height, is not possible"),
    ],
)
def test_no_size(
    smallest: Path, tmp_path: Path, size: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(smallest), "--output", str(tmp_path / "bundle"), "--size", size]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
