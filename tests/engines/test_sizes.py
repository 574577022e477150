"""Several sizes of pictures in one manifest: each may take the place of the bundle's own."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from sd_engines.bundle import Manifest, SizeEntry, open_bundle, portable_entry
from sd_engines.errors import BundleError, ConfigError
from sd_engines.files import hash_files, listed_files
from sd_engines.seal import add_engines, seal
from tiny_onnx import PROFILE, UNET_INPUTS, int8_engine, make_manifest, write_unet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WIDE, HIGH = replace(PROFILE, width=128), replace(PROFILE, height=96)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "staging"


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    """64×64, 64×128 and 96×64, of which the last has the graph of the first."""
    own = make_manifest(folder)
    sizeless = {"inputs": UNET_INPUTS[1:], "outputs": UNET_INPUTS[1:2]}  # nor has it a sample
    own = replace(own, components={"unet": replace(own.components["unet"], **sizeless)})
    write_unet(folder / "unet/model-128x64.onnx", seed=1)
    names = ["unet/model-128x64.onnx", "unet/model-128x64.onnx_data"]
    files = hash_files(folder, names)
    wide = replace(own.components["unet"], file=names[0], files=files)
    engine = portable_entry(
        "unet", wide, WIDE, "onnxruntime", version="1", target="cpu", precision=None
    )
    sizes = (
        SizeEntry(profile=WIDE, components={"unet": wide}, engines=(engine,)),
        SizeEntry(profile=HIGH, components=own.components, engines=own.engines),
    )
    return replace(own, sizes=sizes)


def test_each_size_takes_the_place_of_the_own_one_and_gives_it_back(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert [size.profile for size in manifest.all_sizes] == [PROFILE, WIDE, HIGH]
    assert manifest.at(None, None) is manifest
    assert manifest.at(64, None) is manifest
    for size in manifest.sizes:
        seen = manifest.at(size.profile.height, size.profile.width)
        assert seen.all_sizes[0] == size
        assert {s.profile for s in seen.all_sizes} == {PROFILE, WIDE, HIGH}
        assert listed_files(seen) == listed_files(manifest)
        assert seen.at(64, 64) == manifest


def test_a_size_that_is_not_there(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"draws 64×64, 64×128, 96×64 .*, not 64×256") as caught:
        manifest.at(None, 256)
    assert caught.value.hint.startswith("Take one of these, or export")
    assert "--size 256x64" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        manifest.at(None, 100)
    assert "multiples of 8" in caught.value.hint
    assert "sd-export" not in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        replace(manifest, sizes=()).at(None, 256)
    assert caught.value.hint.startswith("Leave the size out")


def test_bundles_of_before_have_one_size(manifest: Manifest) -> None:
    data = json.loads(manifest.to_json())
    del data["sizes"]
    assert Manifest.from_json(json.dumps(data)) == replace(manifest, sizes=())


def _changed(**profile: int) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["sizes"][0]["profile"].update(profile)


HOSTILE = {
    "twice": (_changed(height=96, width=64), "one size is listed twice"),
    "own": (_changed(width=64), "one size is listed twice"),
    "batch": (_changed(batch_size=1), r"sizes\[0\]: differs in more than height and width"),
    "component": (
        lambda data: data["sizes"][0].update(components={}, engines=[]),
        r"sizes\[0\]: has other components than the bundle",
    ),
    "bytes": (
        lambda data: data["sizes"][1]["components"]["unet"]["files"]["unet/model.onnx_data"].update(
            bytes=1
        ),
        r"sizes\[1\]: 'unet/model.onnx_data' is listed twice",
    ),
    "engine": (
        lambda data: data["sizes"][0].update(engines=data["engines"]),
        r"sizes\[0\].engines\[0\]: .* is not the ONNX of 'unet'",
    ),
    "unknown": (lambda data: data["sizes"][0].update(files={}), r"sizes\[0\].files: is unknown"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_sizes(name: str, manifest: Manifest) -> None:
    change, message = HOSTILE[name]
    data = json.loads(manifest.to_json())
    change(data)
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(data))


def test_an_engine_is_added_wherever_its_graph_is(
    manifest: Manifest, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bundle"
    seal(folder, path, manifest)
    file = int8_engine("unet").file
    (tmp_path / "made" / file).parent.mkdir(parents=True)
    (tmp_path / "made" / file).write_bytes(b"engine")
    built = hash_files(tmp_path / "made", [file])[file]
    engine = int8_engine("unet", sha256=built.sha256, bytes=built.bytes)  # type: ignore[arg-type]
    added = add_engines(path, tmp_path / "made", engines=[engine], height=96)
    assert [engine in size.engines for size in added.all_sizes] == [True, False, True]
    assert open_bundle(path).manifest == added
    open_bundle(path).verify()
