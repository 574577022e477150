"""Trains the VAE of the shipped checkpoint: ``python benchmarks/shapes/train_vae.py OUTPUT``.

Crops first, whole pictures at the end: flat shapes teach an autoencoder little per pixel, and a
crop around a shape teaches the same for a quarter of the work. Pixels of shapes weigh more than
background, which would otherwise drown their colours.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from descent import Descent
from diffusers import AutoencoderKL
from PIL import Image

from sd_bench.checker import faults
from sd_bench.scene import BACKGROUNDS, Scene, draw, random_scene

RESOLUTION = 128
CROP = 64
PALETTE = torch.tensor(list(BACKGROUNDS.values())).float() / 127.5 - 1


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 32, 64, 96],
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=RESOLUTION,
    )


def batch(rng: np.random.Generator, *, size: int, crop: int) -> torch.Tensor:
    """``size`` drawings, float32 [size, 3, crop, crop] in [-1, 1], each crop around a shape."""
    pictures = []
    while len(pictures) < size:
        scene = hard_scene(rng)
        image, placements = draw(scene, rng, resolution=RESOLUTION)
        pixels = np.asarray(image)
        spot = placements[rng.integers(len(placements))]
        top, left = (
            int(np.clip(c * RESOLUTION - crop * rng.uniform(0.1, 0.9), 0, RESOLUTION - crop))
            for c in (spot.y, spot.x)
        )
        pictures.append(pixels[top : top + crop, left : left + crop])
    return as_images(torch.from_numpy(np.stack(pictures)))


def as_images(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, h, w, 3] as float32 [n, 3, h, w] in [-1, 1]."""
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last)


def hard_scene(rng: np.random.Generator) -> Scene:
    """A training scene, more often than not with a star or cross whose points are easily lost."""
    for _ in range(3):
        scene = random_scene(rng, held_out=False)
        if any(t.shape in ("star", "cross") and t.size != "large" for t in scene.things):
            break
    return scene


def pixel_weights(images: torch.Tensor, *, shape: float) -> torch.Tensor:
    """1 on background, ``shape`` on shapes and their edges: [n, 1, h, w]."""
    gap = (images[:, None] - PALETTE[None, :, :, None, None]).abs().amax(dim=2)
    return 1 + (shape - 1) * (gap.amin(dim=1, keepdim=True) > 0.02).float()


def reconstruction_loss(error: torch.Tensor) -> torch.Tensor:
    """Of weighted differences: the mean of their size, and half that of their squares."""
    return error.abs().mean() + 0.5 * error.square().mean()


def round_trip_faults(vae: AutoencoderKL, *, pictures: int) -> float:
    """Share of held-out drawings that the checker no longer reads right after a round trip."""
    rng = np.random.default_rng(7)
    wrong = 0
    for _ in range(pictures):
        scene = random_scene(rng, held_out=True)
        image, _ = draw(scene, rng, resolution=RESOLUTION)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].float()
        decoded = ((back.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        wrong += bool(faults(Image.fromarray(decoded), scene))
    return wrong / pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(time.time_ns())
    vae = new_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    descent = Descent(
        optimizer, minutes=args.minutes, learning_rate=args.learning_rate, warm_up=100
    )
    running, reported = 0.0, time.time()
    for progress in descent:
        whole = progress > 0.6
        images = batch(rng, size=16 if whole else 48, crop=RESOLUTION if whole else CROP)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = (decoded.float() - images) * pixel_weights(images, shape=4 if whole else 8)
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = reconstruction_loss(error) + 2e-4 * divergence
        descent.step(loss)
        running = 0.98 * running + 0.02 * float(error.detach().abs().mean())
        if time.time() - reported > 120:
            reported = time.time()
            vae.save_pretrained(args.output)
            wrong = round_trip_faults(vae, pictures=50)
            print(
                f"{progress:4.0%} step {descent.steps} error {running:.4f} "
                f"KL {divergence.item():.2f} held-out round trips wrong {wrong:.0%}",
                flush=True,
            )
    vae.save_pretrained(args.output)
    print(f"held-out round trips wrong: {round_trip_faults(vae, pictures=500):.1%}", flush=True)


if __name__ == "__main__":
    main()
