"""A manifest is read back as it was written; a hostile one is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from sd_engines.bundle import portable_entry
from sd_engines.entries import CertificateEntry
from sd_engines.errors import BundleError
from sd_engines.manifest import MAX_MANIFEST_BYTES, Manifest
from tiny_onnx import int8_engine, make_bundle, make_manifest, stale_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HASH = "0" * 64


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_manifest(tmp_path)


def test_round_trip(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(manifest.to_json().encode()) == manifest


def test_a_manifest_of_before_has_the_defaults_of_then(manifest: Manifest) -> None:
    data = json.loads(manifest.to_json())
    defaults = data["model"]["defaults"]
    assert (defaults.pop("strength"), defaults.pop("inpainting_strength")) == (0.8, 1.0)
    assert Manifest.from_json(json.dumps(data)) == manifest
    assert data["model"].pop("defaults") == {"num_inference_steps": 50, "guidance_scale": 7.5}
    for name in ("force_zeros_for_empty_prompt", "requires_aesthetics_score"):
        assert data["model"].pop(name) is False
    for name in ("low_res_scheduler", "max_noise_level"):
        assert data["model"].pop(name) is None
    assert data["model"].pop("controlnets") == []
    assert Manifest.from_json(json.dumps(data)) == manifest
    data["model"]["force_zeros_for_empty_prompt"] = 1
    with pytest.raises(BundleError, match="force_zeros_for_empty_prompt: must be true or false"):
        Manifest.from_json(json.dumps(data))


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *folders, last, value = path

    def change(data: dict[str, Any]) -> None:
        node: Any = data
        for key in folders:
            node = node[key]
        node[last] = value

    return change


def _drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    *folders, last = path

    def change(data: dict[str, Any]) -> None:
        node: Any = data
        for key in folders:
            node = node[key]
        del node[last]

    return change


def _file(name: str) -> Callable[[dict[str, Any]], None]:
    return _set("files", name, {"sha256": HASH, "bytes": 1})


HOSTILE = {
    "no steps": (
        _set("model", "defaults", {"num_inference_steps": 0, "guidance_scale": 1}),
        "model.defaults.num_inference_steps: must be a whole number from 1",
    ),
    "more steps than trained": (
        _set("model", "defaults", "num_inference_steps", 1001),
        "model.defaults.num_inference_steps: must be a whole number from 1 to the sch.*, 1000",
    ),
    "strength": (
        _set("model", "defaults", "strength", 2.0),
        "model.defaults.strength: must be a number from 0 to 1",
    ),
    "inpainting strength": (
        _set("model", "defaults", "inpainting_strength", -1.0),
        "model.defaults.inpainting_strength: must be a number from 0 to 1",
    ),
    "no scheduler": (_set("model", "scheduler", {}), "model.scheduler._class_name: is missing"),
    "scheduler null": (
        _set("model", "scheduler", "_class_name", None),
        "model.scheduler._class_name: must be a text",
    ),
    **{
        f"{length} timesteps": (
            _set("model", "scheduler", "num_train_timesteps", length),
            "model.scheduler.num_train_timesteps: must be a whole number from 1 to 100000",
        )
        for length in (0, -1, 10**9, 10**30, 1e3, None)
    },
    "low-res timesteps": (
        _set("model", "low_res_scheduler", {"num_train_timesteps": 10**9}),
        "model.low_res_scheduler.num_train_timesteps: must be a whole number from 1 to 100000",
    ),
    "half of the defaults": (
        _set("model", "defaults", {"num_inference_steps": 4}),
        "model.defaults.guidance_scale: is missing",
    ),
    "null defaults": (_set("model", "defaults", None), "model.defaults: must be an object"),
    "no version": (_drop("format_version"), "format_version: is missing"),
    "newer version": (_set("format_version", 2), "format_version: 2 is unknown; this is"),
    "version as text": (_set("format_version", "1"), "format_version: must be a whole number"),
    "version as bool": (_set("format_version", True), "format_version: must be a whole number"),
    "unknown field": (_set("run_this", "rm"), "run_this: is unknown"),
    "unknown nested field": (_set("profile", "depth", 3), "profile.depth: is unknown"),
    "missing profile": (_drop("profile"), "profile: is missing"),
    "profile as list": (_set("profile", []), "profile: must be an object"),
    "engines as object": (_set("engines", {}), "engines: must be an array"),
    "engine as text": (_set("engines", ["x"]), r"engines\[0\]: must be an object"),
    "batch 0": (_set("profile", "batch_size", 0), "profile.batch_size: must be a whole number"),
    "huge height": (_set("profile", "height", 10**9), "profile.height"),
    "odd height": (_set("profile", "height", 65), "multiples of vae_scale_factor"),
    "scale as text": (_set("model", "vae_scaling_factor", "1"), "must be a finite number"),
    "source null": (_set("model", "source", None), "model.source: must be a text"),
    "parent path": (_file("../outside"), "no path of a file inside the bundle"),
    "hidden parent": (_file("a/../../outside"), "no path of a file inside the bundle"),
    "absolute path": (_file("/etc/passwd"), "no path of a file inside the bundle"),
    "windows path": (_file("C:/secret"), "no path of a file inside the bundle"),
    "backslash": (_file("..\\outside"), "no path of a file inside the bundle"),
    "double slash": (_file("a//b"), "no path of a file inside the bundle"),
    "dot": (_file("./a"), "no path of a file inside the bundle"),
    "empty": (_file(""), "no path of a file inside the bundle"),
    "nul": (_file("a\0b"), "no path of a file inside the bundle"),
    "long": (_file("a/" * 600 + "b"), "no path of a file inside the bundle"),
    "long part": (_file("é" * 128), "no path of a file inside the bundle"),  # 256 bytes
    "long in bytes": (_file(("é" * 100 + "/") * 6 + "b"), "no path of a file inside the bundle"),
    "manifest itself": (_file("bundle.json"), "no path of a file inside the bundle"),
    "surrogate": (_file("a\ud800"), "no path of a file inside the bundle"),
    "controlnet 1": (
        _set("model", "controlnets", ["canny", 1]),
        "model.controlnets.1: must be a text",
    ),
    "controlnets as text": (_set("model", "controlnets", "canny"), "must be an array"),
    "terminal codes": (_set("model", "source", "\x1b[2J"), "model.source: holds control"),
    "coded field": (_set("\x1b[2J", 1), r"'\\x1b\[2J': is unknown"),
    "long field": (_set("x" * 10**5, 1), "…: is unknown"),
    "infinite": (_set("model", "vae_scaling_factor", 10**400), "must be a finite number"),
    "negative size": (_set("files", "tokenizer/tokenizer.json", "bytes", -1), "bytes: must be"),
    "short hash": (_set("files", "tokenizer/tokenizer.json", "sha256", "ab"), "64 lower-case"),
    "component path": (_set("components", "unet", "file", "../m.onnx"), "no path of a file"),
    "component name": (_set("components", "../x", {}), "no name of a component"),
    "file not listed": (_set("components", "unet", "file", "unet/b.onnx"), "does not list"),
    "low-res scheduler": (_set("model", "low_res_scheduler", []), "must be an object"),
    "noise level": (_set("model", "max_noise_level", -1), "max_noise_level: must be a whole"),
    "precision": (_set("components", "unet", "precision", "int3"), "'int3' is none of fp32"),
    "graph in int8": (_set("components", "unet", "precision", "int8"), "'int8' is none of fp32"),
    "int8 that is no engine": (_set("engines", 1, "precision", "int8"), "is listed twice"),
    "dtype": (_set("components", "unet", "inputs", 0, "dtype", "object"), "'object' is none of"),
    "shape": (_set("components", "unet", "inputs", 0, "shape", ["batch", 0]), "axis 1 is 0"),
    "symbolic": (_set("components", "unet", "inputs", 0, "shape", [4, "batch"]), "axis 1 is 'b"),
    "twin inputs": (_set("components", "unet", "inputs", 0, "name", "timestep"), "different names"),
    "backend": (_set("engines", 0, "backend", "pickle"), "'pickle' is none of tensorrt"),
    "target": (_set("engines", 0, "target", "x"), r"engines\[0\].target: 'x' is none of onnxr"),
    "openvino on cuda": (_set("engines", 1, "target", "cuda"), "'cuda' is none of openvino's"),
    "engine path": (_set("engines", 0, "file", "/tmp/x.engine"), "no path of a file"),  # noqa: S108
    "engine file": (_set("engines", 0, "file", "unet/model.onnx_data"), "_data' is not the ONNX"),
    "engine component": (_set("engines", 0, "component", "vae"), "'vae' is not in the bundle"),
    "twice listed": (_file("unet/model.onnx"), "is listed twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(manifest: Manifest, name: str) -> None:
    change, message = HOSTILE[name]
    data = json.loads(manifest.to_json())
    change(data)
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.from_json(json.dumps(data))
    assert "Install the sd-toolkit that made it" in caught.value.hint
    assert "sd-export" in caught.value.hint
    assert len(str(caught.value)) < 1000


def test_the_version_is_read_before_all_else(manifest: Manifest) -> None:
    data = {"a_field_of_then": [], **json.loads(manifest.to_json()), "format_version": 2}
    del data["profile"]
    with pytest.raises(BundleError, match="format_version: 2 is unknown"):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "must be an object"),
        ("null", "must be an object"),
        (b"\xff\xfe\x00", "not valid JSON: 'utf-8' codec"),
        ("[" * 100_000, "not valid JSON: it is nested more than 16 deep"),
        ('{"format_version": ' + "9" * 10_000 + "}", "not valid JSON: Exceeds the limit"),
    ],
    ids=lambda text: f"{text[:12]!r}",
)
def test_no_manifest_at_all(text: str | bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ('"format_version": 1, "format_version": 1', "not valid JSON: an object names one field"),
        ('"format_version": NaN', "not valid JSON: NaN is no JSON number"),
        ('"format_version": -Infinity', "not valid JSON: -Infinity is no JSON number"),
        ('"x": ' + "[" * 16 + "]" * 16, "not valid JSON: it is nested more than 16 deep"),
        ('"x": ' + "[" * 15 + "]" * 15, "format_version: is missing"),
        (r'"x": "[[[[[[[[\"[[[[[[[[[["', "format_version: is missing"),
    ],
)
def test_json_is_read_strictly(manifest: Manifest, field: str, message: str) -> None:
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(text.replace('"format_version": 1', field))


def test_its_bytes_are_utf_8_and_counted(manifest: Manifest) -> None:
    text = replace(manifest, versions={"torch": "é"}).to_json()
    for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1"):
        with pytest.raises(BundleError, match="not valid JSON"):
            Manifest.from_json(text.encode(encoding))
    most = MAX_MANIFEST_BYTES - len(text.encode())
    assert Manifest.from_json(text + " " * most).versions == {"torch": "é"}
    with pytest.raises(BundleError, match="larger than 16777216 bytes"):
        Manifest.from_json(text + " " * (most + 1))


def test_not_written_what_is_too_long_to_be_read(manifest: Manifest) -> None:
    """As text it is short enough, as UTF-8 it is not."""
    with pytest.raises(BundleError, match="larger than"):
        replace(manifest, versions={"torch": "é" * (9 << 20)}).to_json()


def test_the_targets_of_a_plan(manifest: Manifest) -> None:
    plan = stale_plan("fp16")
    for target in ("any", "sm120", "sm86+sm89", "sm90a"):
        replace(manifest, engines=(replace(plan, target=target),)).to_json()
    for target in ("cpu", "sm", "sm86+", "any+sm86"):
        with pytest.raises(BundleError, match="is none of tensorrt-rtx's"):
            replace(manifest, engines=(replace(plan, target=target),)).to_json()


def test_an_engine_is_of_no_other_file_though_that_is_listed(manifest: Manifest) -> None:
    file = "unet/model.onnx_data"
    listed = manifest.components["unet"].files[file]
    engine = replace(manifest.engines[0], file=file, sha256=listed.sha256, bytes=listed.bytes)
    with pytest.raises(
        BundleError, match=r"engines\[0\]: 'unet/model.onnx_data' is not the ONNX of 'unet'"
    ):
        replace(manifest, engines=(engine,)).to_json()


def test_an_int8_engine_has_a_file_of_its_own(manifest: Manifest) -> None:
    engine = int8_engine("unet")
    both = replace(manifest, engines=(*manifest.engines, engine))
    assert Manifest.from_json(both.to_json()).engines[-1] == engine
    assert engine.is_built
    assert not manifest.engines[0].is_built


def test_not_written_what_would_not_be_read(manifest: Manifest) -> None:
    bad = CertificateEntry(
        component="unet",
        backend="onnxruntime",
        precision="fp32",
        reference="numpy",
        metric="relative_l2",
        figure=float("nan"),
        tolerance=1e-4,
        measured_at="2026-11-20T00:00:00Z",
    )
    with pytest.raises(BundleError, match="not JSON compliant"):
        replace(manifest, certificate=(bad,)).to_json()
    assert replace(manifest, certificate=(replace(bad, figure=0.0),)).to_json()


def test_fingerprint_is_of_the_weights_not_of_the_engines(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "a").manifest
    entry = manifest.components["unet"]
    engine = portable_entry(
        "unet", entry, manifest.profile, "openvino", version="1", target="cpu", precision="fp32"
    )
    more = replace(manifest, engines=(*manifest.engines, engine), versions={"torch": "9"})
    assert more.fingerprint == manifest.fingerprint
    other = make_bundle(tmp_path / "b", seed=1).manifest
    assert other.fingerprint != manifest.fingerprint
