"""Teaches the VAE's decoder to read the latents that the UNet makes.

``python benchmarks/shapes/train_decoder.py FOLDER`` goes on with FOLDER, a complete diffusers
checkpoint, and replaces its VAE's decoder. What the UNet makes is not quite what the encoder
makes: points of small stars come out fainter. Pairs for it are at hand: a drawing that is made
noisy and denoised again by the UNet keeps its places, and its details are the UNet's own.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from descent import Descent
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline
from train_vae import (
    RESOLUTION,
    as_images,
    hard_scene,
    pixel_weights,
    reconstruction_loss,
    round_trip_faults,
)

from sd_bench.scene import caption, draw

STRENGTH = 0.3
"""Share of the noise that is added and taken away again: more of it moves what is drawn."""
GUIDANCE_SCALE = 3.0


def denoised_pairs(
    pipeline: StableDiffusionImg2ImgPipeline, *, count: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawings uint8 [count, h, w, 3], and latents float32 of what the UNet makes of them."""
    drawings, latents = [], []
    while len(drawings) < count:
        scenes = [hard_scene(rng) for _ in range(32)]
        pictures = [draw(scene, rng, resolution=RESOLUTION)[0] for scene in scenes]
        with torch.autocast("cpu", torch.bfloat16):
            made = pipeline(
                [caption(scene, rng) for scene in scenes],
                image=pictures,
                strength=STRENGTH,
                num_inference_steps=20,
                guidance_scale=GUIDANCE_SCALE,
                output_type="latent",
            ).images
        drawings += [torch.from_numpy(np.array(picture)) for picture in pictures]
        latents.append(made.float())
    return torch.stack(drawings), torch.cat(latents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(time.time_ns())
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(args.folder, safety_checker=None)
    pipeline.to(torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    started = time.time()
    drawings, latents = denoised_pairs(pipeline, count=args.pairs, rng=rng)
    print(f"{len(drawings)} pairs in {time.time() - started:.0f} s", flush=True)

    vae = pipeline.vae.to(memory_format=torch.channels_last)
    scale = vae.config.scaling_factor
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0, betas=(0.9, 0.98), weight_decay=0.0)
    descent = Descent(optimizer, minutes=args.minutes, learning_rate=args.learning_rate, warm_up=50)
    running, reported = 0.0, time.time()
    for progress in descent:
        rows = torch.randint(len(drawings), (16,))
        images = as_images(drawings[rows])
        with torch.autocast("cpu", torch.bfloat16):
            encoded = vae.encode(images[:4]).latent_dist.sample()
            read = torch.cat([encoded.float(), latents[rows][4:] / scale])
            decoded = vae.decode(read.contiguous(memory_format=torch.channels_last)).sample
        error = (decoded.float() - images) * pixel_weights(images, shape=4)
        loss = reconstruction_loss(error)
        descent.step(loss)
        running = 0.98 * running + 0.02 * float(error.detach().abs().mean())
        if time.time() - reported > 60:
            reported = time.time()
            print(f"{progress:4.0%} step {descent.steps} error {running:.4f}", flush=True)
    vae.save_pretrained(args.folder / "vae")
    print(f"held-out round trips wrong: {round_trip_faults(vae, pictures=500):.1%}", flush=True)


if __name__ == "__main__":
    main()
