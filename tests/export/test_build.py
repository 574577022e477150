"""Engines are added to a bundle from the ONNX inside it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import sd_export
from sd_engines.bundle import open_bundle
from sd_engines.engine import open_engine
from sd_engines.errors import BackendError, BundleError, ConfigError, ExportError
from sd_export import verify
from sd_export.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from sd_export import ExportReport
    from sd_export.progress import StageEvent


@pytest.fixture
def bundle(report: ExportReport, tmp_path: Path) -> Path:
    return shutil.copytree(report.path, tmp_path / "bundle")


def test_tensorrt_rtx_computes_the_unet_in_fp16_and_the_rest_in_tf32(bundle: Path) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx package")
    before = open_bundle(bundle).manifest
    manifest = sd_export.build(bundle, backends=("tensorrt-rtx",))
    opened = open_bundle(bundle)
    opened.verify()
    assert opened.manifest == manifest
    assert manifest.components == before.components
    built = {e.component: e for e in manifest.engines if e.backend == "tensorrt-rtx"}
    assert built.keys() == manifest.components.keys()
    for component, engine in built.items():
        expected = {"unet": "fp16", "safety_checker": "fp32"}.get(component, "tf32")
        assert engine.precision == expected
        assert engine.version == rtx.__version__
        opened.verified_engine(engine)  # its key is that of the graph in the bundle
    measured = [c for c in manifest.certificate if c not in before.certificate]
    assert ("unet", "onnxruntime", "fp16") in {
        (c.component, c.backend, c.precision) for c in measured
    }
    assert all(c.figure < 5e-3 for c in measured if c.component == "unet")
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]

    events: list[StageEvent] = []
    again = sd_export.build(bundle, backends=("tensorrt-rtx",), progress=events.append)
    assert again == manifest
    assert {e.state for e in events if e.stage == "build tensorrt-rtx"} == {"skipped"}


def test_onnx_runtime_is_asked_for_before_the_work_that_it_proves(
    bundle: Path, smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_export.graph_proof.find_spec", lambda name: None)
    events: list[StageEvent] = []
    with pytest.raises(BackendError, match="ONNX Runtime is not installed") as error:
        sd_export.build(bundle, backends=("tensorrt-rtx",), progress=events.append)
    assert error.value.hint == 'pip install "sd-toolkit[cpu]"'
    with pytest.raises(BackendError, match="ONNX Runtime is not installed"):
        sd_export.export(
            smallest, tmp_path / "none", backends=("openvino",), progress=events.append
        )
    assert events == []
    assert not (tmp_path / "none").exists()


def test_a_workspace(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Built anew for another limit, and not for the same or for none."""
    pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx package")
    states = []
    for option in ((), ("--workspace-mib", "64"), ("--workspace-mib", "64"), ()):
        assert main(["build", str(bundle), "--backend", "tensorrt-rtx", *option]) == 0
        (unet,) = (
            engine
            for engine in open_bundle(bundle).manifest.engines
            if (engine.component, engine.backend) == ("unet", "tensorrt-rtx")
        )
        states.append((unet.flags["workspace_bytes"], "already there" in capsys.readouterr().err))
    limit = str(64 << 20)
    assert states == [("all", False), (limit, False), (limit, True), (limit, True)]


def test_a_workspace_is_for_what_is_built(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", str(bundle), "--backend", "onnxruntime", "--workspace-mib", "64"]
    assert main(command) == 2
    assert "for onnxruntime" in capsys.readouterr().err
    assert main([*command[:-1], "0"]) == 2


def test_a_target_and_bf16_for_tensorrt_rtx(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx package")
    manifest = sd_export.build(bundle, backends=("tensorrt-rtx",), precision="bf16", target="sm120")
    (unet,) = (e for e in manifest.engines if (e.component, e.target) == ("unet", "sm120"))
    assert (unet.backend, unet.precision) == ("tensorrt-rtx", "bf16")
    measured = [c for c in manifest.certificate if (c.component, c.precision) == ("unet", "bf16")]
    assert len(measured) == has_bf16(), "of the copy that it was built of"
    assert all(c.backend == "openvino" and 1e-4 < c.figure < c.tolerance for c in measured)
    open_bundle(bundle).verified_engine(unet)
    with pytest.raises(ConfigError, match="does not build for 'sm1'"):
        sd_export.build(bundle, backends=("tensorrt-rtx",), target="sm1")


def test_the_usual_target_is_not_any(bundle: Path) -> None:
    """An engine for other GPUs is not the one for all."""
    pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx package")
    sd_export.build(bundle, backends=("tensorrt-rtx",), target="sm89")
    manifest = sd_export.build(bundle, backends=("tensorrt-rtx",))
    built = {(e.component, e.target) for e in manifest.engines if e.backend == "tensorrt-rtx"}
    assert built == {(name, target) for name in manifest.components for target in ("sm89", "any")}


def test_a_backend_named_twice_builds_once(report_of_2022: ExportReport, tmp_path: Path) -> None:
    bundle = shutil.copytree(report_of_2022.path, tmp_path / "bundle")
    manifest = sd_export.build(bundle, backends=("openvino", "openvino"))
    added = [e.component for e in manifest.engines if e.backend == "openvino"]
    measured = [c.component for c in manifest.certificate if c.backend == "openvino"]
    assert sorted(added) == sorted(measured) == sorted(manifest.components)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_precision_that_is_not_made_is_refused(bundle: Path, backend: str) -> None:
    before = (bundle / "bundle.json").read_bytes()
    with pytest.raises(ConfigError, match="unet is fp32; fp16 cannot be made of it") as caught:
        sd_export.build(bundle, backends=(backend,), precision="fp16")
    assert caught.value.hint == "Export the checkpoint again with --precision fp16."
    assert (bundle / "bundle.json").read_bytes() == before


def has_bf16() -> bool:
    openvino = pytest.importorskip("openvino", reason="needs the openvino package")
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_openvino_in_bf16_is_added_and_runs(bundle: Path) -> None:
    if not has_bf16():
        pytest.skip("this processor has no bf16")
    manifest = sd_export.build(bundle, backends=("openvino",), precision="bf16")
    rows = {c.component: c for c in manifest.certificate if c.precision == "bf16"}
    assert set(rows) == set(manifest.components) - {"safety_checker"}
    for row in rows.values():
        assert row.backend == "openvino"
        assert 1e-4 < row.figure < row.tolerance
        assert row.reference.startswith("the bundle's ONNX")
    with open_engine(open_bundle(bundle), "unet", backend="openvino", precision="bf16") as engine:
        assert engine.entry.precision == "bf16"


def test_an_engine_that_misses_its_tolerance_leaves_the_bundle_as_it_was(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle / "bundle.json").read_bytes()
    monkeypatch.setitem(verify.RELATIVE_L2, "bf16", 1e-12)
    monkeypatch.setitem(verify.RELATIVE_L2, "fp16", 1e-12)
    pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx package")
    with pytest.raises(ExportError, match="unet: verify: relative_l2"):
        sd_export.build(bundle, backends=("tensorrt-rtx",))
    assert (bundle / "bundle.json").read_bytes() == before
    assert not (bundle / "engines").exists()
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]


def test_a_bundle_that_was_altered_is_refused(bundle: Path) -> None:
    weights = bundle / "text_encoder/model.onnx_data"
    data = bytearray(weights.read_bytes())
    data[10] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"text_encoder/model\.onnx_data: altered"):
        sd_export.build(bundle, backends=("openvino",))
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]


def without_override() -> None:
    """In a process about to begin: let permissions hold for root as well."""
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def test_a_bundle_that_is_read_only_is_refused_before_anything_is_built(
    report_of_2022: ExportReport, tmp_path: Path
) -> None:
    bundle = shutil.copytree(report_of_2022.path, tmp_path / "bundle")
    bundle.chmod(0o555)
    code = "import sys; from sd_export.cli import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "build", str(bundle), "--backend", "openvino"],
        capture_output=True,
        text=True,
        preexec_fn=without_override,
    )
    bundle.chmod(0o755)
    assert result.returncode == 3, result.stderr
    assert f"{bundle} is not writable" in result.stderr
    assert "build openvino" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle"]


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        sd_export.build(tmp_path / "nowhere", backends=("openvino",))
    with pytest.raises(ConfigError, match="unknown backend"):
        sd_export.build(tmp_path, backends=("cuda",))
    assert not any(tmp_path.iterdir())
