"""What the prompt alone decides is computed once for it, and is what the whole graph computes."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import numpy as np

from openvino_models import compiled, kinds
from sd_engines import open_bundle, open_engine
from sd_engines.backends.openvino_package import package
from sd_engines.backends.openvino_steady import STEADY_INPUT, part_steady

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

TOKENS, WIDTH, HEAD = 77, 48, 32
RANDOM = np.random.default_rng(11)


def _weight(*shape: int) -> NDArray[np.float32]:
    return RANDOM.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-2]))


def attending(*, layers: int = 2) -> Any:
    """``layers`` of cross-attention, one after the other, and a count of the prompt's tokens."""
    ops = package().opset13
    sample = ops.parameter([2, 16, HEAD], np.float32, name="sample")
    prompt = ops.parameter([2, TOKENS, WIDTH], np.float32, name=STEADY_INPUT)
    for parameter in (sample, prompt):
        parameter.output(0).set_names({parameter.get_friendly_name()})
    values = sample
    for _ in range(layers):
        query = ops.matmul(values, ops.constant(_weight(HEAD, HEAD)), False, False)
        key, value = (
            ops.matmul(prompt, ops.constant(_weight(WIDTH, HEAD)), False, False) for _ in range(2)
        )
        scores = ops.softmax(ops.matmul(query, key, False, True), -1)
        values = ops.add(values, ops.matmul(scores, value, False, False))
    mean = ops.reduce_mean(prompt, ops.constant(np.array([1, 2])), True)  # no product: it stays
    return package().Model([ops.add(values, mean)], [sample, prompt])


def products(model: Any) -> int:
    return kinds(model).count("MatMul")


def test_two_parts_give_the_bits_of_the_whole() -> None:
    model = attending()
    whole = compiled(model.clone())
    moving, steady = part_steady(model)
    assert (products(moving), products(steady)) == (6, 4)
    sample = RANDOM.standard_normal((2, 16, HEAD), np.float32)
    prompt = RANDOM.standard_normal((2, TOKENS, WIDTH), np.float32)
    expected = whole({"sample": sample, STEADY_INPUT: prompt})[0]
    parts = compiled(steady)({STEADY_INPUT: prompt})
    handed_over = {port.get_any_name(): array for port, array in parts.items()}
    found = compiled(moving)({"sample": sample, STEADY_INPUT: prompt, **handed_over})[0]
    np.testing.assert_array_equal(found, expected)


def test_half_precision_is_not_handed_over() -> None:
    """OpenVINO computes such a graph in fp32 and would round what lies between two."""
    model = attending()
    ops = package().opset13
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            halves = [ops.convert(value, "f16") for value in node.input_values()]
            transposed = node.get_attributes()["transpose_b"]
            product = ops.convert(ops.matmul(*halves, False, transposed), "f32")
            node.output(0).replace(product.output(0))
    whole, steady = part_steady(model)
    assert steady is None
    assert whole is model


def test_what_asks_no_prompt_stays_whole() -> None:
    model = attending(layers=0)
    assert part_steady(model) == (model, None)


def test_an_engine_notices_another_prompt(shapes_bundle: Path) -> None:
    """Whoever writes to its buffers, and whatever the memory is used for that it let go of."""
    bundle = open_bundle(shapes_bundle)
    with (
        open_engine(bundle, "unet", backend="openvino", precision="fp32") as engine,
        open_engine(bundle, "unet", backend="onnxruntime") as reference,
    ):
        binding = engine.bind(2, pictures=1)
        binding.inputs["timestep"][...] = 300
        gc.collect()
        rubbish = [RANDOM.standard_normal((2, 77, 128), np.float32) for _ in range(64)]
        for scale in (0.0, 1.0, 1.0, -2.0):
            for name in ("sample", STEADY_INPUT):
                array = binding.inputs[name]
                drawn = np.random.default_rng(5).standard_normal(array.shape, np.float32)
                array[...] = scale * drawn if name == STEADY_INPUT else drawn
            binding.run()
            expected = reference(**binding.inputs)["noise_pred"]
            error = np.linalg.norm(binding.outputs["noise_pred"] - expected)
            assert error < 1e-4 * np.linalg.norm(expected)
        assert len(rubbish) == 64
