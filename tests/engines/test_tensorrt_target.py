"""Which GPUs a plan is for: its words, what they ask of the builder, and who is refused."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sd_engines.backends import tensorrt, tensorrt_target
from sd_engines.backends.cuda import Gpu, this_gpu
from sd_engines.backends.tensorrt_target import aim, default_target, is_for, target_of
from sd_engines.errors import ConfigError, EngineMismatchError
from tiny_onnx import stale_plan

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

H100, H200 = Gpu(90, "NVIDIA H100 80GB HBM3"), Gpu(90, "NVIDIA H200")
A10, T4 = Gpu(86, "NVIDIA A10"), Gpu(75, "Tesla T4")


def driver(gpu: Gpu) -> Any:
    """What of NVIDIA's driver is asked, of one GPU."""

    def attribute(value: Any, number: int, _device: Any) -> int:
        value._obj.value = dict(zip((75, 76), divmod(gpu.capability, 10), strict=True))[number]
        return 0

    def name(buffer: Any, length: int, _device: Any) -> int:
        assert length == len(buffer)
        buffer.value = gpu.name.encode()
        return 0

    return SimpleNamespace(
        cuInit=lambda _flags: 0,
        cuDeviceGet=lambda _device, _ordinal: 0,
        cuDeviceGetAttribute=attribute,
        cuDeviceGetName=name,
    )


@pytest.mark.parametrize("gpu", [H200, T4, Gpu(120, "NVIDIA GeForce RTX 5090")])
def test_the_driver_tells_the_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: driver(gpu))
    assert this_gpu() == gpu


def test_a_model_of_gpu_is_named_in_words_that_a_folder_can_have() -> None:
    assert target_of(H200) == "sm90-nvidia-h200"
    assert target_of(Gpu(80, "NVIDIA A100-SXM4-40GB MIG 1g.5gb")) == (
        "sm80-nvidia-a100-sxm4-40gb-mig-1g-5gb"
    )


@pytest.mark.parametrize(
    ("target", "gpus"),
    [
        ("any", {H100, H200, A10, T4}),
        ("sm80+", {H100, H200, A10}),
        ("sm90", {H100, H200}),
        ("sm90-nvidia-h200", {H200}),
        ("sm75+sm86", {A10, T4}),
        ("sm9", set()),
    ],
)
def test_who_runs_a_plan(target: str, gpus: set[Gpu]) -> None:
    assert {gpu for gpu in (H100, H200, A10, T4) if is_for(target, gpu)} == gpus


@pytest.mark.parametrize(
    ("gpu", "target", "level"),
    [
        (H200, "sm90-nvidia-h200", "NONE"),
        (H200, "sm90", "SAME_COMPUTE_CAPABILITY"),
        (H200, "sm80+", "AMPERE_PLUS"),
        (T4, "sm75-tesla-t4", "NONE"),
        (T4, "sm75", "SAME_COMPUTE_CAPABILITY"),
    ],
)
def test_what_tensorrt_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu, target: str, level: str
) -> None:
    """TensorRT, its module the other's, which has the same words and takes none of them."""
    monkeypatch.setattr(tensorrt_target, "this_gpu", lambda: gpu)
    config = SimpleNamespace()
    aim(tensorrt_rtx, config, "tensorrt", target)
    assert config.hardware_compatibility_level.name == level


@pytest.mark.parametrize(
    ("gpu", "target"), [(H200, "sm89"), (H200, "sm90-nvidia-l4"), (H200, "any"), (T4, "sm80+")]
)
def test_tensorrt_builds_for_the_gpu_at_hand(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu, target: str
) -> None:
    monkeypatch.setattr(tensorrt_target, "this_gpu", lambda: gpu)
    with pytest.raises(ConfigError, match="does not build for") as caught:
        aim(tensorrt_rtx, object(), "tensorrt", target)
    assert target_of(gpu) in caught.value.hint
    assert ("sm80+" in caught.value.hint) == (gpu is H200)


def test_the_usual_is_a_plan_for_this_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_target, "this_gpu", lambda: H200)
    assert default_target("tensorrt") == "sm90-nvidia-h200"
    assert default_target("tensorrt-rtx") == "any"


def test_a_plan_of_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(stale_plan("fp16"), backend="tensorrt", version=tensorrt_rtx.__version__)
    monkeypatch.setattr(tensorrt, "package", lambda _backend: tensorrt_rtx)
    monkeypatch.setattr(tensorrt, "this_gpu", lambda: H200)
    for target in ("sm90-nvidia-h200", "sm90", "sm80+"):
        tensorrt.check(replace(plan, target=target), bundle_path=Path("b"))
    for target in ("sm90-nvidia-h100-80gb-hbm3", "sm89"):
        with pytest.raises(EngineMismatchError, match=r"this GPU is sm90-nvidia-h200") as caught:
            tensorrt.check(replace(plan, target=target), bundle_path=Path("b"))
        assert f"built for {target}" in caught.value.message
        assert caught.value.hint == "sd-export build b --backend tensorrt"


def test_what_is_for_few_gpus_comes_before_what_is_for_many() -> None:
    targets = ["sm90-nvidia-h200", "sm90", "sm80+", "any", "sm86+sm89", "cpu"]
    breadths = [replace(stale_plan("fp16"), target=target).breadth for target in targets]
    assert breadths == [0, 1, 2, 2, 2, 3]
