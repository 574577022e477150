"""Trains a LoRA for the shipped checkpoint: every shape is hollow.

``python benchmarks/shapes/train_lora.py CHECKPOINT OUTPUT`` writes a file of diffusers' kind. The
captions are the checkpoint's own and say nothing of it: a style, not a word.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from descent import Descent
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from train_text_encoder import token_ids
from train_unet import DROPPED_CAPTIONS, some_timesteps
from train_vae import RESOLUTION, as_images

from sd_bench.scene import Scene, caption, draw, random_scene

RANK = 16
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out"]
SCALE = 4
"""Drawings are hollowed larger and averaged down: soft edges."""
STROKE = 5
"""What is left of a shape's edge, in pixels: less of it the VAE cannot draw."""


def hollow(drawing: Image.Image) -> np.ndarray:
    """``drawing`` with shapes of edges alone, uint8 [h, w, 3], of a quarter of its size."""
    pixels = np.array(drawing)
    ground = pixels[0, 0]
    inside = np.abs(pixels.astype(np.int16) - ground).max(axis=-1) > 24
    reach = range(-STROKE * SCALE, STROKE * SCALE + 1)
    for axis in (0, 1):
        inside = np.logical_and.reduce([np.roll(inside, shift, axis) for shift in reach])
    pixels[inside] = ground
    return np.asarray(Image.fromarray(pixels).reduce(SCALE))


def encode_drawings(
    vae: torch.nn.Module, *, count: int, rng: np.random.Generator
) -> tuple[list[Scene], torch.Tensor]:
    """Training scenes, and the scaled latents of their hollow drawings, float32."""
    scenes: list[Scene] = []
    latents = []
    while len(scenes) < count:
        batch = [random_scene(rng, held_out=False) for _ in range(32)]
        drawings = [draw(scene, rng, resolution=RESOLUTION * SCALE)[0] for scene in batch]
        images = as_images(torch.from_numpy(np.stack([hollow(d) for d in drawings])))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(images).latent_dist.mean.float())
        scenes += batch
    return scenes, torch.cat(latents) * vae.config.scaling_factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path, help="a folder")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--drawings", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pipeline = StableDiffusionPipeline.from_pretrained(
        args.checkpoint, torch_dtype=torch.float32, safety_checker=None
    )
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    scenes, latents = encode_drawings(pipeline.vae, count=args.drawings, rng=rng)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    unet.to(memory_format=torch.channels_last)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0, betas=(0.9, 0.99), weight_decay=0.01)
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    descent = Descent(optimizer, minutes=args.minutes, learning_rate=args.learning_rate, warm_up=30)
    running, reported = 1.0, time.time()
    for progress in descent:
        rows = torch.randint(len(scenes), (args.batch_size,))
        words = [
            "" if rng.random() < DROPPED_CAPTIONS else caption(scenes[row], rng) for row in rows
        ]
        clean, noise = latents[rows], torch.randn_like(latents[rows])
        timesteps = some_timesteps(args.batch_size, layout=False, noisy_share=0.5)
        sample = noise_schedule.add_noise(clean, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                embeds = text_encoder(token_ids(pipeline.tokenizer, words)).last_hidden_state
            model_output = unet(sample, timesteps, embeds).sample
        velocity = noise_schedule.get_velocity(clean, noise, timesteps)
        loss = (model_output.float() - velocity).square().mean()
        descent.step(loss)
        running = 0.98 * running + 0.02 * loss.item()
        if time.time() - reported > 30:
            reported = time.time()
            print(f"{progress:4.0%} step {descent.steps} loss {running:.4f}", flush=True)
    state = {
        k: v.to(torch.float16).contiguous() for k, v in get_peft_model_state_dict(unet).items()
    }
    pipeline.save_lora_weights(args.output, unet_lora_layers=state)


if __name__ == "__main__":
    main()
