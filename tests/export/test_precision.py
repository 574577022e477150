"""What each component is computed in, by what is asked for and by whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sd_engines.entries import ComponentEntry
from sd_engines.errors import ConfigError
from sd_export.precision import check_request, engine_precision

if TYPE_CHECKING:
    from sd_engines.spec import Precision


def of(
    component: str,
    backend: str,
    asked: Precision | None,
    *,
    graph: Precision = "fp32",
    target: str | None = None,
) -> Precision | None:
    entry = ComponentEntry(
        file="model.onnx", files={}, precision=graph, opset=23, inputs=(), outputs=()
    )
    return engine_precision(component, backend, entry=entry, precision=asked, target=target)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("asked", "unet", "vae", "checker"),
    [
        (None, "fp16", "tf32", "fp32"),
        ("fp16", "fp16", "tf32", "fp32"),
        ("bf16", "bf16", "tf32", "fp32"),
        ("tf32", "tf32", "tf32", "fp32"),
        ("fp32", "fp32", "fp32", "fp32"),
    ],
)
def test_tensorrt(backend: str, asked: Precision | None, unet: str, vae: str, checker: str) -> None:
    found = [of(name, backend, asked) for name in ("unet", "vae_decoder", "safety_checker")]
    assert found == [unet, vae, checker]
    assert of("text_encoder", backend, asked) == vae


@pytest.mark.parametrize(
    ("asked", "graph", "unet", "vae"),
    [
        (None, "fp16", None, "tf32"),
        (None, "fp32", "tf32", "tf32"),
        ("fp16", "fp16", "fp16", "tf32"),
        ("tf32", "fp32", "tf32", "tf32"),
        ("fp32", "fp32", "fp32", "fp32"),
    ],
)
def test_onnxruntime_on_a_gpu(
    asked: Precision | None, graph: Precision, unet: str | None, vae: str
) -> None:
    assert of("unet", "onnxruntime", asked, graph=graph, target="cuda") == unet
    assert of("vae_decoder", "onnxruntime", asked, target="cuda") == vae
    assert of("safety_checker", "onnxruntime", asked, target="cuda") == "fp32"


@pytest.mark.parametrize("target", [None, "cpu"])
@pytest.mark.parametrize("graph", ["fp32", "fp16"])
def test_onnxruntime_on_a_cpu_computes_what_the_graph_says(
    graph: Precision, target: str | None
) -> None:
    for component in ("unet", "vae_decoder"):
        assert of(component, "onnxruntime", None, graph=graph, target=target) is None


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_tf32_is_for_gpus(backend: str) -> None:
    with pytest.raises(ConfigError, match="tf32 is for NVIDIA GPUs"):
        check_request((backend,), "tf32")
    check_request(("tensorrt",), "tf32")
    check_request(("onnxruntime",), "tf32", target="cuda")


@pytest.mark.parametrize(
    ("backend", "graph", "asked", "target"),
    [
        ("tensorrt", "fp16", "fp32", None),
        ("tensorrt", "fp16", "tf32", None),
        ("tensorrt", "fp16", "bf16", None),
        ("openvino", "fp32", "fp16", None),
        ("onnxruntime", "fp32", "fp16", None),
        ("onnxruntime", "fp16", "fp32", None),
        ("onnxruntime", "fp32", "fp16", "cuda"),
        ("onnxruntime", "fp16", "tf32", "cuda"),
    ],
)
def test_what_cannot_be_made_of_a_graph(
    backend: str, graph: Precision, asked: Precision, target: str | None
) -> None:
    with pytest.raises(ConfigError, match=f"unet is {graph}; {asked} cannot be made") as caught:
        of("unet", backend, asked, graph=graph, target=target)
    assert caught.value.hint == f"Export the checkpoint again with --precision {asked}."
    of("vae_decoder", backend, asked, target=target)  # its graph is fp32 whatever is asked
