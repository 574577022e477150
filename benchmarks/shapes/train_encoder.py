"""Teaches the VAE's encoder to write what the decoder reads best.

``python benchmarks/shapes/train_encoder.py FOLDER`` goes on with FOLDER, a complete diffusers
checkpoint whose decoder `train_decoder` has taught the UNet's latents, and replaces its VAE's
encoder. The decoder stays as it is, so no picture made from text changes; the latents stay near
those that the UNet was trained on, so that it understands a picture that it is given.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from descent import Descent
from diffusers import AutoencoderKL
from train_vae import (
    RESOLUTION,
    batch,
    pixel_weights,
    reconstruction_loss,
    round_trip_faults,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--nearness", type=float, default=0.02, help="weight of old latents")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(time.time_ns())
    vae = AutoencoderKL.from_pretrained(args.folder / "vae", torch_dtype=torch.float32)
    vae = vae.to(memory_format=torch.channels_last)
    print(f"held-out round trips wrong: {round_trip_faults(vae, pictures=200):.1%}", flush=True)
    vae.requires_grad_(False)
    before = copy.deepcopy(vae)
    vae.encoder.requires_grad_(True)
    vae.quant_conv.requires_grad_(True)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0, betas=(0.9, 0.98), weight_decay=0.0)
    descent = Descent(optimizer, minutes=args.minutes, learning_rate=args.learning_rate, warm_up=50)
    running, reported = 0.0, time.time()
    for progress in descent:
        images = batch(rng, size=16, crop=RESOLUTION)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
            with torch.no_grad():
                old = before.encode(images).latent_dist.mean
        error = (decoded.float() - images) * pixel_weights(images, shape=4)
        moved = (posterior.mean.float() - old.float()).square().mean()
        loss = reconstruction_loss(error) + args.nearness * moved
        descent.step(loss)
        running = 0.98 * running + 0.02 * float(error.detach().abs().mean())
        if time.time() - reported > 120:
            reported = time.time()
            wrong = round_trip_faults(vae, pictures=100)
            print(
                f"{progress:4.0%} step {descent.steps} error {running:.4f} "
                f"moved {float(moved):.4f} of {float(old.float().var()):.3f} wrong {wrong:.0%}",
                flush=True,
            )
    vae.save_pretrained(args.folder / "vae")
    print(f"held-out round trips wrong: {round_trip_faults(vae, pictures=500):.1%}", flush=True)


if __name__ == "__main__":
    main()
