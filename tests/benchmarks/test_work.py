"""Work counted from a graph equals what torch counts while it runs the original modules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sd_bench.work import Work, count_work, request_work
from sd_engines.errors import BundleError
from sd_runtime import Pipeline, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHECKPOINT = Path(__file__).parents[2] / "benchmarks" / "shapes" / "checkpoint"
BATCH = 3


def torch_flops(run: Callable[[], Any]) -> int:
    """Torch's own count. It knows no fused attention on a CPU, so attention is products here."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return int(counter.get_total_flops())


def component(name: str) -> tuple[Callable[[], Any], int]:
    """A call of the shipped checkpoint's own module, and the values that go in and come out."""
    import diffusers
    import transformers

    latents, embeds = torch.zeros(BATCH, 4, 16, 16), torch.zeros(BATCH, 77, 128)
    if name == "text_encoder":
        text_encoder = transformers.CLIPTextModel.from_pretrained(CHECKPOINT / name)
        ids = torch.zeros(BATCH, 77, dtype=torch.long)
        return lambda: text_encoder(ids), 8 * ids.numel() + 4 * embeds.numel()
    if name == "unet":
        unet = diffusers.UNet2DConditionModel.from_pretrained(
            CHECKPOINT / name, low_cpu_mem_usage=False
        )
        return lambda: unet(latents, 1.0, embeds), 4 * (
            2 * latents.numel() + BATCH + embeds.numel()
        )
    vae = diffusers.AutoencoderKL.from_pretrained(CHECKPOINT / "vae", low_cpu_mem_usage=False)
    return lambda: vae.decode(latents), 4 * (latents.numel() + BATCH * 128 * 128 * 3)


def stored_weights(name: str) -> int:
    """How many numbers of the checkpoint's file a call reads."""
    folder = CHECKPOINT / ("vae" if name == "vae_decoder" else name)
    path = next(folder.glob("*.safetensors"))
    count = 0
    with safe_open(path, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - it is no dict
            shape = weights.get_slice(key).get_shape()
            if "token_embedding" in key:
                shape = [BATCH * 77, shape[1]]  # a row for each token
            if name != "vae_decoder" or key.startswith(("decoder.", "post_quant_conv.")):
                count += torch.Size(shape).numel()
    return count


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_components_of_a_bundle(name: str, shapes_bundle: Path) -> None:
    call, border_bytes = component(name)
    path = shapes_bundle / name / "model.onnx"
    rows = {"batch": BATCH, "pictures": BATCH}
    work = count_work(path, dimensions=rows)
    assert work.flops == torch_flops(call)
    # The graph also holds its shapes, and the text encoder its causal mask.
    assert work.bytes == pytest.approx(4 * stored_weights(name) + border_bytes, rel=5e-3)
    half = count_work(path, dimensions=rows, precision="bf16")
    assert half.flops == work.flops
    assert work.bytes - half.bytes == pytest.approx((work.bytes - border_bytes) / 2, rel=5e-3)


def test_whole_and_shallow_calls_are_counted_apart(cached_bundle: Path) -> None:
    request = Request(
        "a cat",
        seed=0,
        num_images_per_prompt=3,
        num_inference_steps=4,
        scheduler="ddim",
        guidance_stop=0.5,
        cache_interval=2,
    )
    with Pipeline.load(cached_bundle, backend="onnxruntime", threads=1) as pipeline:
        work = request_work(pipeline, request, pipeline.generate(request).timings)
    for name in ("unet", "unet_shallow"):  # batches of two and of one; guided, then not
        path = cached_bundle / name / "model.onnx"
        flops = [
            count_work(path, dimensions={"batch": rows, "pictures": pictures}).flops
            for rows, pictures in ((4, 2), (2, 1), (2, 2), (1, 1))
        ]
        assert work[name]["calls"] == 4
        assert work[name]["flops"] == sum(flops) / 4


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers
def test_both_text_encoders_are_counted(tmp_path: Path) -> None:
    from sd_export import export
    from tiny_xl import make_xl_checkpoint

    bundle = tmp_path / "bundle"
    export(make_xl_checkpoint(tmp_path / "checkpoint"), bundle)
    with Pipeline.load(bundle, backend="onnxruntime", threads=1) as pipeline:
        request = Request("a cat", negative_prompt="a dog", seed=0, num_inference_steps=1)
        work = request_work(pipeline, request, pipeline.generate(request).timings)
    for name in ("text_encoder", "text_encoder_2"):
        counted = count_work(bundle / name / "model.onnx", dimensions={"batch": 1})
        assert work[name] == {"flops": counted.flops, "bytes": counted.bytes, "calls": 2}


def write_node(
    path: Path,
    op_type: str,
    shapes: Sequence[Sequence[int]],
    output: Sequence[int] | None,
    **attributes: Any,
) -> Path:
    """A graph of one node, all its inputs the graph's."""
    names = [f"x{index}" for index in range(len(shapes))]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op_type, names, ["y"], **attributes)],
        "one",
        [info(n, TensorProto.FLOAT, s) for n, s in zip(names, shapes, strict=True)],
        [info("y", TensorProto.FLOAT, output)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def flops_of(path: Path) -> int:
    return count_work(path, dimensions={}).flops


def test_grouped_convolution_with_strides(tmp_path: Path) -> None:
    shapes = [(2, 6, 9, 9), (4, 3, 3, 3)]
    path = write_node(tmp_path / "a", "Conv", shapes, (2, 4, 4, 4), group=2, strides=[2, 2])
    x, w = (torch.zeros(shape) for shape in shapes)
    assert flops_of(path) == torch_flops(lambda: torch.conv2d(x, w, stride=2, groups=2))


def test_transposed_convolution(tmp_path: Path) -> None:
    shapes = [(2, 6, 5, 5), (6, 4, 3, 3)]
    path = write_node(tmp_path / "a", "ConvTranspose", shapes, (2, 4, 11, 11), strides=[2, 2])
    x, w = (torch.zeros(shape) for shape in shapes)
    assert flops_of(path) == torch_flops(lambda: torch.conv_transpose2d(x, w, stride=2))


def test_matrix_product_that_broadcasts(tmp_path: Path) -> None:
    shapes = [(2, 1, 5, 7), (3, 7, 4)]
    path = write_node(tmp_path / "a", "MatMul", shapes, (2, 3, 5, 4))
    x, y = (torch.zeros(shape) for shape in shapes)
    assert flops_of(path) == torch_flops(lambda: torch.matmul(x, y))


def test_transposed_gemm(tmp_path: Path) -> None:
    path = write_node(tmp_path / "a", "Gemm", [(7, 5), (4, 7)], (5, 4), transA=1, transB=1)
    x, y = torch.zeros(7, 5), torch.zeros(4, 7)
    assert flops_of(path) == torch_flops(lambda: x.T @ y.T)


def test_attention_with_shared_heads_in_either_layout(tmp_path: Path) -> None:
    q, k, v = torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 3)
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = torch_flops(lambda: attention(q, k, v, enable_gqa=True))
    apart = [tuple(x.shape) for x in (q, k, v)]
    joined = [(2, 6, 32), (2, 5, 16), (2, 5, 6)]
    assert flops_of(write_node(tmp_path / "a", "Attention", apart, (2, 4, 6, 3))) == expected
    heads = {"q_num_heads": 4, "kv_num_heads": 2}
    path = write_node(tmp_path / "b", "Attention", joined, (2, 6, 12), **heads)
    assert flops_of(path) == expected


def test_looked_up_weights_count_by_row(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"])],
        "one",
        [info("ids", TensorProto.INT64, ("n",))],
        [info("y", TensorProto.FLOAT, ("n", 8))],
        [helper.make_tensor("table", TensorProto.FLOAT, (1000, 8), [0.0] * 8000)],
    )
    path = tmp_path / "a"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    ids_bytes, row_bytes = 8 * 5, 4 * 8 * 5
    expected = Work(flops=0, bytes=ids_bytes + 2 * row_bytes)
    assert count_work(path, dimensions={"n": 5}) == expected


def test_a_shape_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("NonZero", ["x"], ["found"]),
        helper.make_node("Cast", ["found"], ["z"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "z"], ["y"]),
    ]
    x, y = info("x", TensorProto.FLOAT, (2, 2)), info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "one", [x], [y])
    path = tmp_path / "a"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    with pytest.raises(BundleError, match="shape of 'y'"):
        count_work(path, dimensions={})
