"""Tiny random LDM3D checkpoints, and what diffusers' own pipeline of them draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tiny import change_json, make_checkpoint, seeded

if TYPE_CHECKING:
    from pathlib import Path

    from sd_runtime import Request


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
