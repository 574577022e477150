"""How a plan's contexts are made and run: the package is the real one, plan and CuPy stand in."""

from __future__ import annotations

import sys
import weakref
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sd_engines.backends import tensorrt
from sd_engines.backends.cuda import Gpu
from sd_engines.backends.tensorrt import TensorRtEngine
from sd_engines.bundle import ComponentEntry
from sd_engines.errors import BackendError
from sd_engines.spec import TensorSpec
from streams import Array
from tiny_onnx import stale_plan

if TYPE_CHECKING:
    from pathlib import Path

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
    """Computes nothing; ``streams`` are those that it was enqueued on."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.streams: list[int] = []
        self.addresses: dict[str, int] = {}
        self.rows = 0
        self.memory: list[tuple[int, int]] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.rows = shape[0]
        return name == "sample" and shape[1] == 4

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address > 0

    def update_device_memory_size_for_shapes(self) -> int:
        return self.rows * ROW_BYTES

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory.append((address, size))

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory, "it is the caller who gives it memory"
        self.streams.append(stream)
        KERNELS.append(self.rows)
        return stream > 0


class RuntimeCache:
    """Holds the number of rows that kernels were compiled for."""

    def __init__(self) -> None:
        self.read = b""

    def deserialize(self, blob: bytes) -> bool:
        self.read = blob
        return True

    def serialize(self) -> bytes:
        return bytes(sorted({*self.read, *KERNELS}))


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
        config = SimpleNamespace(**dict.fromkeys(names))
        config.create_runtime_cache = RuntimeCache
        for name in ("runtime_cache", "execution_context_allocation_strategy"):
            setattr(config, f"set_{name}", partial(setattr, config, name))
        return config

    def create_execution_context(self, config: Any = None) -> Context:
        self.contexts.append(Context(config))
        return self.contexts[-1]


class Stream:
    def __init__(self, *, non_blocking: bool = True) -> None:
        self.ptr = 7 + non_blocking

    def synchronize(self) -> None:
        pass

    def begin_capture(self) -> None:
        pass

    def end_capture(self) -> Any:
        return SimpleNamespace(launch=lambda stream: LAUNCHED.append(stream.ptr))


ROW_BYTES = 1000
LAUNCHED: list[int] = []
KERNELS: list[int] = []
"""Rows of all that ran, as if a kernel were compiled for each."""
CURRENT = [SimpleNamespace(ptr=0)]
BLOCKS: list[weakref.ref[Any]] = []
MADE: list[weakref.ref[Array]] = []
ALIVE: list[int] = []
"""How many buffers there were whenever memory was to be given back."""


def zeros(shape: tuple[int, ...], dtype: str) -> Array:
    array = np.zeros(shape, dtype).view(Array)
    MADE.append(weakref.ref(array))
    return array


class Block:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def alloc(size: int) -> Any:
    if size > 64 * ROW_BYTES:
        raise MemoryError("out of memory")
    memory = Block(256 * (len(BLOCKS) + 1))
    BLOCKS.append(weakref.ref(memory))
    return memory


def free_all_blocks() -> None:
    ALIVE.append(sum(made() is not None for made in (*MADE, *BLOCKS)))


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
            "alloc": staticmethod(lambda size: alloc(size)),
            "get_current_stream": staticmethod(lambda: CURRENT[-1]),
        },
    ),
)


@pytest.fixture(autouse=True)
def nothing_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for each in (LAUNCHED, MADE, ALIVE, BLOCKS, KERNELS):
        each.clear()
    monkeypatch.setattr("sd_engines.backends.tensorrt_contexts.compute_capability", lambda: 120)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def engine_of(module: Any) -> tuple[TensorRtEngine, Plan]:
    plan = Plan(module)
    engine = TensorRtEngine(
        module, object(), plan, CUPY, component=COMPONENT, engine=stale_plan("fp32"), max_batch=99
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
        memory = context.config.execution_context_allocation_strategy
        assert memory == tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED
    assert [context.streams for context in plan.contexts] == [[7, 7, 7], [7]]
    buffers = {**binding.inputs, **binding.outputs}
    assert plan.contexts[0].addresses == {name: buffers[name].data.ptr for name in SPECS}
    assert not LAUNCHED
    with pytest.raises(BackendError, match="closed"):
        binding.run()


def test_tensorrt_is_captured_after_its_first_run() -> None:
    """TensorRT has no such strategies: the module is the other's, without them."""
    names = (
        "ILogger",
        "Logger",
        "TensorIOMode",
        "float32",
        "nptype",
        "ExecutionContextAllocationStrategy",
    )
    module = type("tensorrt", (), {name: getattr(tensorrt_rtx, name) for name in names})
    engine, plan = engine_of(module)
    with engine:
        binding = engine.bind(2)
        for _ in range(3):
            binding.run()
    (context,) = plan.contexts
    assert context.config == tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED
    assert context.streams == [7, 8], "run once, and captured on a stream of its own"
    assert LAUNCHED == [7, 7]


def test_closing_gives_all_buffers_and_the_plan_back() -> None:
    engine, plan = engine_of(tensorrt_rtx)
    gone = weakref.ref(plan)
    del plan
    binding = engine.bind(1)
    engine.bind(2).run()
    engine(sample=np.ones((1, 4), np.float32))
    assert len(MADE) == 3 * len(SPECS)
    buffers = len(binding.inputs) + len(binding.outputs)
    engine.close()
    engine.close()
    (alive,) = ALIVE
    assert alive == buffers, "those that the caller still holds"
    assert gone() is None


def test_engines_of_one_stream_work_in_one_block_of_memory() -> None:
    """As large as the largest of them needs, and let go with the last of them."""
    (one, plan), (other, others) = engine_of(tensorrt_rtx), engine_of(tensorrt_rtx)
    bindings = [one.bind(2), other.bind(5), one.bind(3)]
    for binding in (*bindings, *bindings):
        binding.run()
    contexts = [plan.contexts[0], others.contexts[0], plan.contexts[1]]
    assert [context.memory for context in contexts] == [
        [(512, rows * ROW_BYTES)] for rows in (2, 5, 3)
    ]
    assert [block() is not None for block in BLOCKS] == [False, True], "the first was outgrown"
    one.close()
    assert BLOCKS[1]() is not None
    other.close()
    assert BLOCKS[1]() is None


def test_engines_of_other_streams_work_in_other_memory() -> None:
    engine, plan = engine_of(tensorrt_rtx)
    with engine:
        binding = engine.bind(1)
        binding.run()
        CURRENT.append(SimpleNamespace(ptr=99))
        try:
            binding.run()
        finally:
            CURRENT.pop()
    assert plan.contexts[0].memory == [(256, ROW_BYTES), (512, ROW_BYTES)]


def test_no_memory_to_work_in_is_an_error_that_says_how_much() -> None:
    engine, _ = engine_of(tensorrt_rtx)
    with engine, pytest.raises(BackendError, match=r"activations, 0 MB: out of memory") as caught:
        engine.bind(65)
    assert "fewer or smaller pictures" in caught.value.hint


def test_what_tensorrt_rtx_compiles_is_kept_for_the_next_process() -> None:
    engine, plan = engine_of(tensorrt_rtx)
    with engine:
        engine.bind(3).run()
        engine.bind(2).run()
        engine.bind(2).run()
    assert plan.contexts[0].config.runtime_cache.read == b"", "nothing is known at first"
    KERNELS.clear()
    again, plan = engine_of(tensorrt_rtx)
    with again:
        again.bind(1)
    assert plan.contexts[0].config.runtime_cache.read == bytes([2, 3])


def test_a_gpu_that_tensorrt_rtx_does_not_list_is_named_where_a_plan_does_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Runtime:
        def __init__(self, _log: Any) -> None:
            pass

        def deserialize_cuda_engine(self, _plan: bytes) -> None:
            return None

    (tmp_path / "unet.engine").touch()
    monkeypatch.setitem(sys.modules, "cupy", CUPY)
    monkeypatch.setattr(tensorrt_rtx, "Runtime", Runtime)
    for capability, said in ((90, r"lists SM75, .*SM121; this GPU is SM90"), (89, r"\.engine\n")):
        monkeypatch.setattr(tensorrt, "this_gpu", lambda here=capability: Gpu(here, "NVIDIA GPU"))
        with pytest.raises(BackendError, match=said):
            tensorrt.load(
                tmp_path / "unet.engine",
                component=COMPONENT,
                engine=stale_plan("fp32"),
                max_batch=1,
            )
