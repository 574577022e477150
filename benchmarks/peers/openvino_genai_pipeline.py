"""Worker of `sd-bench peers`: OpenVINO GenAI on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from protocol import Drawing, Job, serve

if TYPE_CHECKING:
    from collections.abc import Sequence

# `import openvino` sends an event to Intel; without the package it takes an empty stub.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoGenAi:
    """`Text2ImagePipeline` over what `optimum-cli export openvino` wrote."""

    packages = ("openvino-genai", "openvino", "openvino-tokenizers", "optimum-intel", "numpy")

    def __init__(self) -> None:
        self._pipeline: Any = None

    def prepare(self, job: Job, folder: Path) -> None:
        """Export to OpenVINO's format, weights in fp32, tokenizer too, as GenAI's guide does."""
        program = Path(sys.executable).parent / "optimum-cli"
        options = ["--model", job.model, "--task", "text-to-image", "--weight-format", "fp32"]
        command = [str(program), "export", "openvino", *options, str(folder / "openvino")]
        subprocess.run(command, check=True)  # noqa: S603 - the command is ours

    def load(self, job: Job) -> dict[str, str]:
        """Fix the shapes, then compile: static shapes are what GenAI's guide says is fastest."""
        import openvino_genai

        pipeline = openvino_genai.Text2ImagePipeline(Path(job.prepared) / "openvino")
        pipeline.set_scheduler(openvino_genai.Scheduler.from_config(job.scheduler))
        pipeline.reshape(1, job.height, job.width, job.guidance_scale)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_PRECISION_HINT": _PRECISIONS[job.precision],
        }
        pipeline.compile("CPU", **settings, INFERENCE_NUM_THREADS=job.threads)
        self._pipeline = pipeline
        settings["reshape"] = "static"
        return settings | job.unchecked

    def generate(self, job: Job, *, with_latents: bool) -> Drawing:
        """Draw from the job's own starting noise; no torch is imported for it."""
        kept: list[np.ndarray[Any, Any]] = []

        def keep(_step: int, _num_steps: int, latents: Any) -> bool:
            kept[:] = [np.array(latents.data)]
            return False

        options: dict[str, Any] = {"callback": keep} if with_latents else {}
        image = self._pipeline.generate(
            job.prompt,
            negative_prompt=job.negative_prompt,
            height=job.height,
            width=job.width,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            generator=_generator(np.load(job.noise)),
            **options,
        )
        return Drawing(np.array(image.data)[0], kept[0] if kept else None)


def _generator(noise: np.ndarray[Any, Any]) -> Any:
    """GenAI's source of noise that gives out ``noise`` [draws, …], one draw a call."""
    import openvino
    import openvino_genai

    class Given(openvino_genai.Generator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._draws = iter(noise)

        def randn_tensor(self, shape: Sequence[int]) -> Any:
            return openvino.Tensor(np.ascontiguousarray(next(self._draws).reshape(tuple(shape))))

        def next(self) -> float:
            raise NotImplementedError("noise comes by the tensor")

        def seed(self, new_seed: int) -> None:
            """Keep what is given: the seed is in it."""

    return Given()


if __name__ == "__main__":
    serve(OpenVinoGenAi())
