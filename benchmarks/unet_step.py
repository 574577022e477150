"""How long torch's own ways take for one UNet step, beside what the device reaches at its best.

``python benchmarks/unet_step.py CHECKPOINT --output FILE.json [--device cuda] [--dtype float16]``

Eager diffusers, torch.compile, and a model compiled ahead of time by Inductor (AOTInductor), which
needs no Python to run; on a GPU the first and the last as a CUDA graph too. They take turns on the
same inputs: two samples, as guidance has them. What fails is a result, in its own words. Engines of
a bundle are measured by ``sd-bench latency``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import torch
from diffusers import UNet2DConditionModel

from sd_bench import ceiling
from sd_bench.environment import environment

if TYPE_CHECKING:
    from collections.abc import Callable

    Step = Callable[[], torch.Tensor]

SAMPLES: Final = 2
PRODUCT_SIZE: Final = {"cuda": ceiling.PRODUCT_SIZE_GPU, "cpu": ceiling.PRODUCT_SIZE}
COPY_BYTES: Final = {"cuda": ceiling.COPY_BYTES_GPU, "cpu": ceiling.COPY_BYTES}
WARM_UPS: Final = 3


@dataclass
class Way:
    """One way to run the step, and what came of it. ``error`` is relative L2 from float32."""

    name: str
    prepare_s: float = 0.0
    ms: list[float] = field(default_factory=list)
    error: float | None = None
    failed: str | None = None


class Bench:
    """The UNet of ``checkpoint`` on ``device``, and its inputs."""

    def __init__(self, checkpoint: Path, device: str, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        unet = self._unet(checkpoint, torch.float32)
        generator = torch.Generator().manual_seed(0)
        size, channels = unet.config.sample_size, unet.config.in_channels
        tokens = SAMPLES, 77, unet.config.cross_attention_dim
        shapes = (SAMPLES, channels, size, size), tokens
        sample, prompt = (torch.randn(s, generator=generator).to(device) for s in shapes)
        timestep = torch.tensor(500.0, device=device)
        with torch.inference_mode():
            self.reference = unet(sample, timestep, prompt, return_dict=False)[0].float()
        self.unet = self._unet(checkpoint, dtype).to(memory_format=torch.channels_last)
        self.inputs = sample.to(dtype), timestep, prompt.to(dtype)

    def _unet(self, checkpoint: Path, dtype: torch.dtype) -> Any:
        load = UNet2DConditionModel.from_pretrained
        return load(checkpoint / "unet", torch_dtype=dtype).to(self.device).eval()

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def ms(self, step: Step) -> float:
        """What one run takes."""
        self.wait()
        began = perf_counter()
        step()
        self.wait()
        return (perf_counter() - began) * 1e3

    def eager(self) -> Step:
        """As diffusers runs it."""
        return lambda: self.unet(*self.inputs, return_dict=False)[0]

    def compiled(self) -> Step:
        """As diffusers' documentation compiles it; on a GPU that captures CUDA graphs."""
        unet: Any = torch.compile(
            self.unet,
            mode="max-autotune" if self.device == "cuda" else None,
            fullgraph=True,
            dynamic=False,
        )
        return lambda: unet(*self.inputs, return_dict=False)[0]

    def ahead_of_time(self, folder: Path) -> Step:
        """Compiled into ``folder``, and read back."""
        exported = torch.export.export(self.unet, self.inputs, {"return_dict": False})
        path = torch._inductor.aoti_compile_and_package(
            exported,
            package_path=str(folder / "unet.pt2"),
            inductor_configs={"max_autotune": self.device == "cuda", "freezing": True},
        )
        runner = torch._inductor.aoti_load_package(path)
        return lambda: runner(*self.inputs, return_dict=False)[0]

    def captured(self, step: Step) -> Step:
        """``step`` as a CUDA graph."""
        beside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return made

        return replay

    def ways(self, folder: Path) -> dict[str, Callable[[], Step]]:
        """By name, what makes each of them ready."""
        ahead_of_time = cache(lambda: self.ahead_of_time(folder))
        ways: dict[str, Callable[[], Step]] = {
            "diffusers": self.eager,
            "torch.compile": self.compiled,
            "AOTInductor": ahead_of_time,
        }
        if self.device == "cuda":
            ways["diffusers, CUDA graph"] = lambda: self.captured(self.eager())
            ways["AOTInductor, CUDA graph"] = lambda: self.captured(ahead_of_time())
        return ways

    def ceilings(self) -> dict[str, float]:
        """FLOP/s of a product in this dtype, and bytes read and written a second by a copy."""
        size, copied = PRODUCT_SIZE[self.device], COPY_BYTES[self.device]
        a = torch.randn(size, size, device=self.device).to(self.dtype)
        source = torch.ones(copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        product_s = min(self.ms(lambda: a @ a) for _ in range(10)) / 1e3
        copy_s = min(self.ms(lambda: target.copy_(source)) for _ in range(10)) / 1e3
        return {"matmul_flops": 2 * size**3 / product_s, "copy_bytes_per_s": 2 * copied / copy_s}


def measure(bench: Bench, *, rounds: int) -> list[Way]:
    """Every way, made ready one after the other and run in turns."""
    found: list[tuple[Way, Step | None]] = []
    with TemporaryDirectory() as folder:
        for name, prepare in bench.ways(Path(folder)).items():
            found.append(_ready(bench, Way(name), prepare))
        for index in range(rounds):
            for way, step in found[:: -1 if index % 2 else 1]:
                if step is not None:
                    way.ms.append(bench.ms(step))
    return [way for way, _ in found]


@torch.inference_mode()
def _ready(bench: Bench, way: Way, prepare: Callable[[], Step]) -> tuple[Way, Step | None]:
    began = perf_counter()
    try:
        step = prepare()
        for _ in range(WARM_UPS):
            made = step()
        bench.wait()
    except Exception as error:
        way.failed = f"{type(error).__name__}: {error}"
        return way, None
    way.prepare_s = perf_counter() - began
    difference = torch.linalg.vector_norm(made.float() - bench.reference)
    way.error = float(difference / torch.linalg.vector_norm(bench.reference))
    return way, torch.inference_mode()(step)


def main() -> None:
    """Read the command line, measure, and print a line of each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=sorted(PRODUCT_SIZE), default="cuda")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    bench = Bench(arguments.checkpoint, arguments.device, getattr(torch, arguments.dtype))
    ways = measure(bench, rounds=arguments.rounds)
    ceilings = bench.ceilings()
    report = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**environment(), "torch": torch.__version__},
        "device": arguments.device,
        "dtype": arguments.dtype,
        "samples": SAMPLES,
        "ceilings": ceilings,
        "ways": [asdict(way) for way in ways],
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    for way in ways:
        said = f"failed: {way.failed}"
        if way.failed is None:
            said = f"{statistics.median(way.ms):9.2f} ms, {min(way.ms):.2f} at best, "
            said += f"off by {way.error:.1e}, ready in {way.prepare_s:.0f} s"
        print(f"{way.name:<24} {said}")  # noqa: T201
    for name, value in ceilings.items():
        print(f"{name:<24} {value / 1e12:9.2f} T/s")  # noqa: T201


if __name__ == "__main__":
    main()
