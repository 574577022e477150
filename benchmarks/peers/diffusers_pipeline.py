"""Worker of `sd-bench peers`: diffusers' own pipeline, eager or by torch.compile."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Drawing, Job, serve


class Diffusers:
    """`StableDiffusionPipeline` as diffusers' guides to speed set it up for a CPU or a GPU."""

    packages = ("diffusers", "torch", "transformers", "accelerate", "numpy")

    def __init__(self, *, compiled: bool, device: str) -> None:
        self._compiled = compiled
        self._device = device
        self._pipeline: Any = None

    def prepare(self, job: Job, folder: Path) -> None:
        """Fill the folder with what torch.compile generates; eager needs nothing."""
        if self._compiled:
            self.load(job)
            self.generate(job, with_latents=False)

    def load(self, job: Job) -> dict[str, str]:
        """Load the checkpoint, and wrap what torch.compile is to compile at the first picture."""
        if self._compiled:
            # Both are read when torch is imported. Freezing folds the weights' layouts into the
            # code, which PyTorch's guide to inductor on CPUs recommends for inference.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = job.prepared
            os.environ["TORCHINDUCTOR_FREEZING"] = "1" if self._device == "cpu" else "0"
        import diffusers
        import torch

        torch.set_num_threads(job.threads)
        torch.set_grad_enabled(False)  # freezing asks for it; the pipeline does it by itself
        torch.backends.cudnn.allow_tf32 = False  # on by default, and fp32 is the reference
        without_checker = {"safety_checker": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            job.model,
            torch_dtype=dtype(job),
            local_files_only=True,
            **({} if job.safety_checker else without_checker),
        )
        pipeline.to(self._device)
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
        pipeline.scheduler = scheduler(job)
        pipeline.set_progress_bar_config(disable=True)
        settings = {"memory_format": "channels_last", "attention": "scaled_dot_product_attention"}
        if self._compiled:
            mode = "default" if self._device == "cpu" else "max-autotune"
            compiled = partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)
            pipeline.unet = compiled(pipeline.unet)
            pipeline.vae.decode = compiled(pipeline.vae.decode)
            settings["torch.compile"] = f"UNet and VAE decoder, fullgraph, {mode}"
            settings["freezing"] = os.environ["TORCHINDUCTOR_FREEZING"]
        self._pipeline = pipeline
        return settings

    def generate(self, job: Job, *, with_latents: bool) -> Drawing:
        """Draw from the job's own starting noise."""
        return draw(self._pipeline, job, with_latents=with_latents)


def scheduler(job: Job) -> Any:
    """The scheduler of the job's config, as diffusers makes it."""
    import diffusers

    config = json.loads(Path(job.scheduler).read_text("utf-8"))
    return getattr(diffusers, config["_class_name"]).from_config(config)


def dtype(job: Job) -> Any:
    """The job's precision in the word of torch."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[job.precision]


def draw(pipeline: Any, job: Job, *, with_latents: bool) -> Drawing:
    """Draw by any pipeline with the call of diffusers'."""
    import torch

    noise = torch.from_numpy(np.load(job.noise)[0])
    generator = torch.Generator("cpu").manual_seed(job.seed)
    torch.randn(noise.shape, generator=generator)  # the draw that ``latents`` stands for
    kept: list[Any] = []

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept[:] = [tensors["latents"]]
        return tensors

    image = pipeline(
        job.prompt,
        negative_prompt=job.negative_prompt,
        height=job.height,
        width=job.width,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        latents=noise.to(device=pipeline.device, dtype=dtype(job)),
        generator=generator,
        callback_on_step_end=keep if with_latents else None,
    ).images[0]
    latents = kept[0].to("cpu", torch.float32).numpy() if kept else None
    return Drawing(np.asarray(image.convert("RGB")), latents)


if __name__ == "__main__":
    device = "cuda" if "--cuda" in sys.argv else "cpu"
    serve(Diffusers(compiled="--compile" in sys.argv, device=device))
