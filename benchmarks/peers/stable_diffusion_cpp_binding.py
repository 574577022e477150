"""Worker of `sd-bench peers`: stable-diffusion.cpp by its Python binding, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Drawing, Job, serve

_SAMPLE_METHODS = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "DPMSolverMultistepScheduler": "dpm++2m",
}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
_MODEL = "model.gguf"


class StableDiffusionCpp:
    """f16 weights in GGUF, converted ahead, so that loading converts nothing."""

    packages = ("stable-diffusion-cpp-python", "numpy")

    def __init__(self) -> None:
        self._model: Any = None
        self._sample_method = ""

    def prepare(self, job: Job, folder: Path) -> None:
        """Convert the checkpoint to GGUF, f16."""
        from stable_diffusion_cpp import StableDiffusion

        converter = StableDiffusion(verbose=True)
        if not converter.convert(
            input_path=job.model, output_path=str(folder / _MODEL), output_type=job.precision
        ):
            raise RuntimeError("stable-diffusion.cpp cannot convert this checkpoint (see its log)")

    def load(self, job: Job) -> dict[str, str]:
        """Load the weights; flash attention is slower on most backends, so it stays off."""
        from stable_diffusion_cpp import StableDiffusion

        config = json.loads(Path(job.scheduler).read_text("utf-8"))
        name = config["_class_name"]
        if name not in _SAMPLE_METHODS or config.get("algorithm_type", "dpmsolver++") != (
            "dpmsolver++"
        ):
            known = ", ".join(sorted(_SAMPLE_METHODS))
            raise ValueError(f"stable-diffusion.cpp has no {name}; of diffusers' it has {known}")
        self._sample_method = _SAMPLE_METHODS[name]
        self._model = StableDiffusion(
            model_path=str(Path(job.prepared) / _MODEL),
            n_threads=job.threads,
            rng_type="cpu",  # torch's stream of a CPU generator
            sampler_rng_type="cpu",
            prediction=_PREDICTIONS[config["prediction_type"]],
            vae_decode_only=True,
            verbose=True,
        )
        if not self._model.model:  # a null pointer, which the binding takes for a model
            raise ValueError(
                "stable-diffusion.cpp cannot load this checkpoint: it has the sizes of Stable "
                "Diffusion's own models built in"
            )
        settings = {"noise": "its own, from the same seed by torch's algorithm"}
        return settings | job.unchecked

    def generate(self, job: Job, *, with_latents: bool) -> Drawing:
        """Draw on the job's own sigmas; the binding does not show latents."""
        image = self._model.generate_image(
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            width=job.width,
            height=job.height,
            cfg_scale=job.guidance_scale,
            sample_method=self._sample_method,
            sample_steps=job.num_inference_steps,
            sigmas=",".join(map(repr, job.sigmas)),
            seed=job.seed,
        )[0]
        return Drawing(np.asarray(image.convert("RGB")))


if __name__ == "__main__":
    serve(StableDiffusionCpp())
