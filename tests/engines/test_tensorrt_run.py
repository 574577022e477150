"""How a plan's contexts are made and run: the package is the real one, plan and CuPy stand in."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sd_engines.backends.tensorrt import TensorRtEngine
from sd_engines.bundle import ComponentEntry
from sd_engines.errors import BackendError
from sd_engines.spec import TensorSpec
from streams import Array
from tiny_onnx import stale_plan

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

SPECS = {name: TensorSpec(name, "float32", ("batch", 4)) for name in ("sample", "noise_pred")}
COMPONENT = ComponentEntry(
    file="unet/model.onnx",
    files={},
    precision="fp32",
    opset=23,
    inputs=(SPECS["sample"],),
    outputs=(SPECS["noise_pred"],),
)


class Context:
    """Adds one to what it reads, at once; ``streams`` are those that it was enqueued on."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.streams: list[int] = []
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return name == "sample" and shape[1] == 4

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address > 0

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        return stream > 0


class Plan:
    """What a deserialised engine of one input and one output says."""

    num_io_tensors = 2

    def __init__(self, module: Any) -> None:
        self.module = module
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return [*SPECS][index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.module.TensorIOMode
        return modes.INPUT if name == "sample" else modes.OUTPUT

    def get_tensor_dtype(self, _name: str) -> Any:
        return self.module.float32

    def get_tensor_shape(self, _name: str) -> tuple[int, int]:
        return (-1, 4)

    def create_runtime_config(self) -> Any:
        names = [name for name in dir(self.module.IRuntimeConfig) if not name.startswith("_")]
        return SimpleNamespace(**dict.fromkeys(names))

    def create_execution_context(self, config: Any = None) -> Context:
        self.contexts.append(Context(config))
        return self.contexts[-1]


class Stream:
    def __init__(self, *, non_blocking: bool) -> None:
        self.ptr = 7 + non_blocking

    def synchronize(self) -> None:
        pass

    def begin_capture(self) -> None:
        pass

    def end_capture(self) -> Any:
        return SimpleNamespace(launch=lambda stream: LAUNCHED.append(stream.ptr))


LAUNCHED: list[int] = []
MADE: list[weakref.ref[Array]] = []
ALIVE: list[int] = []
"""How many buffers there were whenever memory was to be given back."""


def zeros(shape: tuple[int, ...], dtype: str) -> Array:
    array = np.zeros(shape, dtype).view(Array)
    MADE.append(weakref.ref(array))
    return array


def free_all_blocks() -> None:
    ALIVE.append(sum(made() is not None for made in MADE))


CUPY = SimpleNamespace(
    zeros=zeros,
    asarray=np.asarray,
    get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=free_all_blocks),
    cuda=type(
        "cuda",
        (),
        {
            "Stream": Stream,
            "Device": staticmethod(lambda: SimpleNamespace(synchronize=lambda: None)),
            "get_current_stream": staticmethod(lambda: SimpleNamespace(ptr=0)),
        },
    ),
)


def engine_of(module: Any) -> tuple[TensorRtEngine, Plan]:
    plan = Plan(module)
    for each in (LAUNCHED, MADE, ALIVE):
        each.clear()
    engine = TensorRtEngine(
        module, object(), plan, CUPY, component=COMPONENT, engine=stale_plan("fp32"), max_batch=2
    )
    return engine, plan


def test_tensorrt_rtx_captures_itself() -> None:
    engine, plan = engine_of(tensorrt_rtx)
    with engine:
        binding = engine.bind(2)
        for _ in range(3):
            binding.run()
        engine(sample=np.ones((1, 4), np.float32))
    for context in plan.contexts:
        strategy = context.config.cuda_graph_strategy
        assert strategy == tensorrt_rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        kernels = context.config.dynamic_shapes_kernel_specialization_strategy
        assert kernels == tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert [context.streams for context in plan.contexts] == [[7, 7, 7], [7]]
    buffers = {**binding.inputs, **binding.outputs}
    assert plan.contexts[0].addresses == {name: buffers[name].data.ptr for name in SPECS}
    assert not LAUNCHED
    with pytest.raises(BackendError, match="closed"):
        binding.run()


def test_tensorrt_is_captured_after_its_first_run() -> None:
    """TensorRT has no such strategies: the module is the other's, without them."""
    names = ("ILogger", "Logger", "TensorIOMode", "float32", "nptype")
    module = type("tensorrt", (), {name: getattr(tensorrt_rtx, name) for name in names})
    engine, plan = engine_of(module)
    with engine:
        binding = engine.bind(2)
        for _ in range(3):
            binding.run()
    (context,) = plan.contexts
    assert context.config is None
    assert context.streams == [7, 8], "run once, and captured on a stream of its own"
    assert LAUNCHED == [7, 7]


def test_closing_gives_all_buffers_back() -> None:
    engine, _ = engine_of(tensorrt_rtx)
    engine.bind(1)
    engine.bind(2).run()
    engine(sample=np.ones((1, 4), np.float32))
    assert len(MADE) == 3 * len(SPECS)
    engine.close()
    engine.close()
    assert ALIVE == [0]
