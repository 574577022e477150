"""Tiny random LDM3D checkpoints, and what diffusers' own pipelines of them draw.

``ldm3d_upscaler.npz`` holds what its community pipeline makes of `UPSCALED` with the checkpoint of
`tiny_upscaler.make_ldm3d_upscaler`: for case i ``pixels_i`` uint8, ``depth_i`` uint16 and
``latents_i`` float32, from a torch generator of seed 7, ``target_res`` 16×24; a ``scheduler`` is
diffusers' own class of that name, of the checkpoint's config. The file is
pipeline_stable_diffusion_upscale_ldm3d.py of huggingface/diffusers, unmodified (sha256 80f2d66c03),
in diffusers 0.42.1. It imports LDM3DPipelineOutput from where that no longer lies, so the modules
of ``diffusers.pipelines.deprecated.stable_diffusion_ldm3d`` were put in `sys.modules` under their
old names; its last step, from arrays to 16-bit pictures, fails with the Pillow of today, so it was
asked for arrays, rounded here as it rounds. ``vae``, ``unet`` and ``text_encoder`` are the sums of
the absolute values of their weights: another sum means another checkpoint, not another pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tiny import change_json, make_checkpoint, seeded

if TYPE_CHECKING:
    from sd_runtime import Request

_ROWS, _COLUMNS = np.mgrid[:12, :20]
PICTURE = np.stack([_ROWS * 20, _COLUMNS * 12, 255 - _ROWS * 9 - _COLUMNS], -1).astype(np.uint8)
DEPTH = (_ROWS * 4000 + _COLUMNS**2 * 37).astype(np.uint16)
UPSCALED: tuple[dict[str, Any], ...] = (
    {"num_inference_steps": 3},
    {"num_inference_steps": 4, "noise_level": 200, "guidance_scale": 1.0},
    {"num_inference_steps": 3, "negative_prompt": "a dog", "scheduler": "euler_a"},
)
"""Options beside the prompt "a red circle", `PICTURE` and `DEPTH`; all others are its own."""


def upscaled_expected() -> Any:
    """What is in ``ldm3d_upscaler.npz``, by name."""
    return np.load(Path(__file__).with_name("ldm3d_upscaler.npz"))


def make_ldm3d_checkpoint(folder: Path, *, channels: int, **options: Any) -> Path:
    """As `make_checkpoint`, with a VAE of ``channels``: 4 as Intel/ldm3d-4c, 6 as Intel/ldm3d."""
    import diffusers

    make_checkpoint(folder, **options)
    config = dict(diffusers.AutoencoderKL.load_config(folder / "vae"))
    with seeded(channels):
        vae = diffusers.AutoencoderKL.from_config(
            {**config, "in_channels": channels, "out_channels": channels}
        )
    vae.save_pretrained(folder / "vae")
    change_json(folder / "model_index.json", _class_name="StableDiffusionLDM3DPipeline")
    return folder


def ldm3d_expected(oracle: Any, request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What diffusers' pipeline draws: pixels uint8, depth maps uint16, latents float32.

    Its processor's last step, from arrays to 16-bit pictures, fails with the Pillow of today, and
    of six channels wraps at 8 bits where it is given bytes: so it is done here with its own parts,
    `rgblike_to_depthmap` on integers that hold 16.
    """
    latents: list[torch.Tensor] = []

    def keep(_pipe: object, _step: int, _timestep: object, tensors: dict[str, Any]) -> Any:
        latents[:] = [tensors["latents"]]
        return tensors

    checker, oracle.safety_checker = oracle.safety_checker, None
    try:
        output = oracle(
            list(request.prompts),
            generator=[torch.Generator("cpu").manual_seed(i.seed) for i in request.images()],
            num_images_per_prompt=request.num_images_per_prompt,
            num_inference_steps=request.num_inference_steps,
            output_type="np",
            callback_on_step_end=keep,
        )
    finally:
        oracle.safety_checker = checker
    processor, (last,) = oracle.image_processor, latents
    if oracle.vae.config.out_channels == 4:
        depth = (output.depth[..., 0] * 65535.0).astype(np.uint16)
    else:
        with torch.no_grad():
            painted = oracle.vae.decode(last / oracle.vae.config.scaling_factor).sample
        images = processor.pt_to_numpy(processor.denormalize(painted))[..., 3:]
        bytes_ = (images * 255).round().astype(np.int32)
        depth = np.stack([processor.rgblike_to_depthmap(image) for image in bytes_])
    return (output.rgb * 255).round().astype(np.uint8), depth.astype(np.uint16), last.numpy()
