"""Teaches a tiny decoder to show roughly what the VAE's own would.

``python benchmarks/shapes/train_preview_vae.py CHECKPOINT OUTPUT`` writes an AutoencoderTiny, as
Ollin Boer Bohan's TAESD is one (https://github.com/madebyollin/taesd). Its pupil is the decoder
alone; what it learns from are latents with some noise left in them, as previews have.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from descent import Descent
from diffusers import AutoencoderKL, AutoencoderTiny
from train_vae import RESOLUTION, batch, pixel_weights, reconstruction_loss

NOISE = 0.4
"""Largest standard deviation of what is added to latents of about 1."""


def new_vae() -> AutoencoderTiny:
    """Of 16 channels where TAESD has 64: what it shows is far simpler."""
    return AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(16,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(3, 2, 1, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(time.time_ns())
    teacher = AutoencoderKL.from_pretrained(args.checkpoint / "vae", torch_dtype=torch.float32)
    teacher.requires_grad_(False)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=0, weight_decay=0.0)
    descent = Descent(optimizer, minutes=args.minutes, learning_rate=args.learning_rate, warm_up=50)
    running, reported = 0.0, time.time()
    for progress in descent:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = teacher.encode(batch(rng, size=16, crop=RESOLUTION)).latent_dist.mean.float()
            shown = teacher.decode(latents).sample.float()
        sample = latents * teacher.config.scaling_factor
        noise = NOISE * torch.rand(len(sample), 1, 1, 1) * torch.randn_like(sample)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(sample + noise).sample
        error = (decoded.float() - shown) * pixel_weights(shown, shape=4)
        descent.step(reconstruction_loss(error))
        running = 0.98 * running + 0.02 * float(error.detach().abs().mean())
        if time.time() - reported > 60:
            reported = time.time()
            print(f"{progress:4.0%} step {descent.steps} error {running:.4f}", flush=True)
    vae.to(torch.float16).save_pretrained(args.output)


if __name__ == "__main__":
    main()
