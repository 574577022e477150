"""TensorRT-RTX: plans are built with no GPU; without one, running them is refused in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sd_engines import open_bundle, open_engine
from sd_engines.backends import tensorrt, tensorrt_builder, tensorrt_target
from sd_engines.backends.cuda import Gpu
from sd_engines.cache import cached_file, read_cached, write_cached
from sd_engines.engine import build_engine
from sd_engines.errors import BackendError, ConfigError
from sd_engines.seal import add_engines
from tiny_onnx import PROFILE, has_gpu, unet_entry

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines import Bundle
    from sd_engines.spec import Precision

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def _build(folder: Path, entry: Any, **changed: Any) -> Any:
    return build_engine(
        "tensorrt-rtx",
        folder / entry.file,
        output_dir=folder,
        component="unet",
        entry=entry,
        profile=PROFILE,
        **changed,
    )


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp32"), ("float16", "fp16")])
@pytest.mark.parametrize("opset", [20, 23])
def test_build(tmp_path: Path, opset: int, dtype: str, precision: Precision) -> None:
    unet = unet_entry(tmp_path, opset=opset, dtype=dtype, precision=precision)
    steps: list[tuple[str, int, int]] = []
    entry = _build(tmp_path, unet, progress=lambda *step: steps.append(step))
    assert entry.precision == precision
    assert entry.target == "any"
    assert entry.file == f"engines/tensorrt-rtx-{entry.version}-any/unet.engine"
    assert (tmp_path / entry.file).stat().st_size == entry.bytes > 0
    assert ("Building engine", 0, steps[0][2]) == steps[0]
    assert all(0 <= done <= total for _, done, total in steps)
    again = _build(tmp_path, unet)
    assert again.key == entry.key


def test_tf32_is_what_a_plan_of_a_graph_in_fp32_may_compute_in(tmp_path: Path) -> None:
    unet = unet_entry(tmp_path)
    exact, allowed, again = (
        (entry, (tmp_path / entry.file).read_bytes())
        for entry in (_build(tmp_path, unet, precision=p) for p in ("fp32", "tf32", "fp32"))
    )
    assert [entry.precision for entry, _ in (exact, allowed)] == ["fp32", "tf32"]
    assert exact == again
    assert allowed[1] != exact[1]
    assert allowed[0].key != exact[0].key
    half = unet_entry(tmp_path / "half", dtype="float16", precision="fp16")
    with pytest.raises(ConfigError, match="in the precision of the graph, fp16, not tf32"):
        _build(tmp_path / "half", half, precision="tf32")


def test_target(tmp_path: Path) -> None:
    unet = unet_entry(tmp_path)
    entries = [_build(tmp_path, unet, target=target) for target in (None, "sm120", "sm86+sm89")]
    assert len({entry.file for entry in entries}) == 3
    assert len({entry.key for entry in entries}) == 3
    with pytest.raises(ConfigError, match="does not build for 'sm12'"):
        _build(tmp_path, unet, target="sm12")
    with pytest.raises(ConfigError, match="in the precision of the graph, fp32, not fp16"):
        _build(tmp_path, unet, precision="fp16")


def test_builder_says_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"cannot build unet.*Turing"):
        _build(tmp_path, unet_entry(tmp_path), target="sm75")  # fp32 matrix products
    assert not (tmp_path / "engines").exists()


def test_parser_says_what_it_cannot_read(tmp_path: Path) -> None:
    unet = unet_entry(tmp_path)
    (tmp_path / unet.file).write_bytes(b"nonsense")
    with pytest.raises(BackendError, match=r"cannot parse .*Failed to parse the ONNX model"):
        _build(tmp_path, unet)


@pytest.mark.parametrize("error", [KeyboardInterrupt, BackendError("enough", "stop")])
def test_progress_stops_the_build(tmp_path: Path, error: Any) -> None:
    unet = unet_entry(tmp_path)

    def stop(phase: str, done: int, total: int) -> None:
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        _build(tmp_path, unet, progress=stop)
    assert not (tmp_path / "engines").exists()
    _build(tmp_path, unet)  # and the next one works


def test_workspace_limit(tmp_path: Path) -> None:
    unet = unet_entry(tmp_path)
    entry = tensorrt.build(
        tmp_path / unet.file,
        output_dir=tmp_path,
        backend="tensorrt-rtx",
        component="unet",
        entry=unet,
        profile=PROFILE,
        workspace_bytes=1 << 30,
    )
    assert entry.flags["workspace_bytes"] == str(1 << 30)
    assert entry.key != _build(tmp_path, unet).key


class Timings:
    """A timing cache of TensorRT's, whose header says which card it is of."""

    def __init__(self, known: bytes) -> None:
        self.known = known

    def serialize(self) -> bytes:
        return b"ours: measured"


@pytest.mark.parametrize("known", [b"", b"ours: 1 ms", b"another card's: 2 ms"])
def test_what_was_measured_on_this_card_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bytes
) -> None:
    """TensorRT, its module the other's: that refuses what was measured on another card."""
    module = tensorrt_builder.package("tensorrt-rtx")
    attached = []

    def attach(_config: object, timings: Timings, _ignores_mismatch: bool) -> bool:
        if fits := timings.known[:4] in (b"", b"ours"):
            attached.append(timings.known)
        return fits

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tensorrt_builder, "package", lambda _backend: module)
    monkeypatch.setattr(tensorrt_target, "this_gpu", lambda: Gpu(120, "NVIDIA RTX 5090"))
    monkeypatch.setattr(
        module.IBuilderConfig, "create_timing_cache", lambda _, known: Timings(known)
    )
    monkeypatch.setattr(module.IBuilderConfig, "set_timing_cache", attach)
    remembered = cached_file(f"tensorrt-{module.__version__}-sm120-nvidia-rtx-5090.timings")
    write_cached(remembered, known)
    tensorrt_builder.build(
        tmp_path / "unet/model.onnx",
        output_dir=tmp_path,
        backend="tensorrt",
        component="unet",
        entry=unet_entry(tmp_path),
        profile=PROFILE,
    )
    assert attached == [known if known.startswith(b"ours") else b""]
    assert read_cached(remembered) == b"ours: measured"


def _with_plan(bundle: Bundle, tmp_path: Path) -> Bundle:
    unet = bundle.manifest.components["unet"]
    staging = tmp_path / "staging"
    staging.mkdir()
    entry = build_engine(
        "tensorrt-rtx",
        bundle.path / unet.file,
        output_dir=staging,
        component="unet",
        entry=unet,
        profile=PROFILE,
    )
    add_engines(bundle.path, staging, engines=[entry])
    return open_bundle(bundle.path)


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_no_gpu(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = _with_plan(tiny_bundle, tmp_path)
    bundle.verify()
    with pytest.raises(BackendError, match=r"no NVIDIA driver|finds no GPU") as caught:
        open_engine(bundle, "unet", backend="tensorrt-rtx")
    assert "nvidia-smi" in caught.value.hint
    open_engine(bundle, "unet").close()  # "auto" goes on to the next
