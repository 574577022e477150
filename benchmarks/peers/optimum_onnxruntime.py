"""Worker of `sd-bench peers`: ONNX Runtime through Hugging Face's optimum."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from diffusers_pipeline import draw, scheduler
from protocol import Drawing, Job, serve


class Optimum:
    """`ORTStableDiffusionPipeline` over what `optimum-cli export onnx` wrote."""

    packages = (
        *("optimum", "optimum-onnx", "onnxruntime", "onnxruntime-gpu", "diffusers", "torch"),
        *("transformers", "numpy"),
    )

    def __init__(self, *, device: str) -> None:
        self._device = device
        self._pipeline: Any = None

    def prepare(self, job: Job, folder: Path) -> None:
        """Export to ONNX, as optimum's guide does; in fp16 for a GPU."""
        program = Path(sys.executable).parent / "optimum-cli"
        options = ["--model", job.model, "--task", "text-to-image"]
        if self._device == "cuda":
            options += ["--device", "cuda", "--dtype", "fp16"]
        command = [str(program), "export", "onnx", *options, str(folder / "onnx")]
        subprocess.run(command, check=True)  # noqa: S603 - the command is ours

    def load(self, job: Job) -> dict[str, str]:
        """Open the sessions."""
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        torch.set_num_threads(job.threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job.threads
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[self._device]
        self._pipeline = ORTStableDiffusionPipeline.from_pretrained(
            Path(job.prepared) / "onnx",
            export=False,
            provider=provider,
            session_options=options,
            local_files_only=True,
        )
        self._pipeline.scheduler = scheduler(job)
        self._pipeline.set_progress_bar_config(disable=True)
        settings = {"graph_optimization_level": "all", "provider": provider}
        return settings | job.unchecked

    def generate(self, job: Job, *, with_latents: bool) -> Drawing:
        """Draw from the job's own starting noise."""
        return draw(self._pipeline, job, with_latents=with_latents)


if __name__ == "__main__":
    serve(Optimum(device="cuda" if "--cuda" in sys.argv else "cpu"))
