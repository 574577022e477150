"""Trains the UNet of the shipped checkpoint on the VAE's latents.

``python benchmarks/shapes/train_unet.py FOLDER`` expects FOLDER/vae, FOLDER/tokenizer and
FOLDER/text_encoder from the two scripts before it, and leaves a complete diffusers checkpoint in
FOLDER/checkpoint. A copy of such a checkpoint is a FOLDER too: training goes on from it. Latents
are encoded once; every epoch pairs them with freshly worded captions. The text encoder can read
already and stays as it is.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from descent import Descent
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from train_text_encoder import WIDTH, token_ids
from train_vae import RESOLUTION, as_images
from transformers import CLIPTextModel, CLIPTokenizer

from sd_bench.scene import Scene, caption, draw, lesson

DROPPED_CAPTIONS = 0.1
EMA_DECAY = 0.998


def new_unet() -> UNet2DConditionModel:
    """Attends where it is coarse: there a 3×3 kernel sees a border, so places can be told apart."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        layers_per_block=1,
        block_out_channels=[80, 128, 128],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def encode_scenes(
    vae: AutoencoderKL, *, count: int, seed: int
) -> tuple[list[Scene], torch.Tensor, torch.Tensor]:
    """Scenes with the mean and the standard deviation of their latents, both bfloat16."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    means, stds = [], []
    while len(scenes) < count:
        batch = [lesson(rng) for _ in range(32)]
        pixels = np.stack([np.asarray(draw(s, rng, resolution=RESOLUTION)[0]) for s in batch])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(as_images(torch.from_numpy(pixels))).latent_dist
        scenes += batch
        means.append(posterior.mean.bfloat16().contiguous())
        stds.append(posterior.std.bfloat16().contiguous())
    return scenes, torch.cat(means), torch.cat(stds)


def save(
    folder: Path,
    *,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
) -> None:
    """FOLDER/checkpoint: a copy in fp16 and the diffusers v1 layout, with PNDM as v1 has it."""
    unet, text_encoder, vae = copy.deepcopy((unet, text_encoder, vae))
    for model in (unet, vae):
        model.register_to_config(_name_or_path="shapes")  # not the folder it was trained in
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder / "checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=105, help="0: only put the parts together")
    parser.add_argument("--layout-minutes", type=float, default=12, help="first, of a new UNet")
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--noisy-share", type=float, default=0.7, help="of the timesteps, from the noisier 40 %%"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.folder / "vae").float()
    vae = vae.to(memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(args.folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(args.folder / "text_encoder").float().eval()
    resumed = (args.folder / "unet").is_dir()
    unet = UNet2DConditionModel.from_pretrained(args.folder / "unet") if resumed else new_unet()
    unet = unet.float().to(memory_format=torch.channels_last)
    ema = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0, betas=(0.9, 0.99), weight_decay=0.01)

    started = time.time()
    rng = np.random.default_rng(time.time_ns())
    scenes, means, stds = encode_scenes(vae, count=args.scenes, seed=int(rng.integers(2**31)))
    scale = vae.config.scaling_factor if resumed else 1 / float(means.float().std())
    vae.register_to_config(scaling_factor=scale)
    print(
        f"{len(scenes)} scenes in {time.time() - started:.0f} s, scaling factor {scale:.4f}",
        flush=True,
    )

    # Backgrounds are most of a latent's energy. Predicting noise barely weighs them where they are
    # decided, near pure noise; predicting v (Salimans & Ho 2022) does.
    noise_schedule = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
    )
    descent = Descent(
        optimizer,
        minutes=args.minutes,
        learning_rate=args.learning_rate,
        warm_up=200,
        started=started,
    )
    running, reported = 1.0, time.time()
    for progress in descent:
        layout = 1.0 if resumed else (time.time() - started) / (60 * args.layout_minutes)
        rows = torch.randint(len(scenes), (args.batch_size,))
        words = [
            "" if rng.random() < DROPPED_CAPTIONS else caption(scenes[row], rng) for row in rows
        ]
        mean, std = means[rows].float(), stds[rows].float()
        latents = (mean + std * torch.randn_like(mean)) * scale
        noise = torch.randn_like(latents)
        timesteps = some_timesteps(args.batch_size, layout=layout < 1, noisy_share=args.noisy_share)
        sample = noise_schedule.add_noise(latents, noise, timesteps) * min(1.0, layout)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                prompt_embeds = text_encoder(token_ids(tokenizer, words)).last_hidden_state
            sample = sample.contiguous(memory_format=torch.channels_last)
            model_output = unet(sample, timesteps, prompt_embeds).sample
        velocity = noise_schedule.get_velocity(latents, noise, timesteps)
        loss = (model_output.float() - velocity).square().mean()
        descent.step(loss)
        ema.update_parameters(unet)
        running = 0.98 * running + 0.02 * loss.item()
        if descent.steps % 50 == 0:
            print(f"{progress:4.0%} step {descent.steps} loss {running:.4f}", flush=True)
        if time.time() - reported > 300:
            reported = time.time()
            save(args.folder, unet=ema.module, text_encoder=text_encoder, vae=vae)
    save(args.folder, unet=ema.module, text_encoder=text_encoder, vae=vae)


def some_timesteps(count: int, *, layout: bool, noisy_share: float) -> torch.Tensor:
    """Timesteps, int64 [count]: ``noisy_share`` of the noisier 40 %, the last for the layout.

    What a caption says of places must be learned from pure noise, where it is the only clue, and
    there it drowns in what is easier. So a new UNet begins with that alone, and with the noise
    turned down: it finds out within minutes what it did not in hours of all timesteps. Edges and
    points are decided later, where there is less noise: a lower share teaches those.
    """
    if layout:
        return torch.full((count,), 999)
    noisy = torch.rand(count) < noisy_share
    return torch.where(noisy, torch.randint(600, 1000, (count,)), torch.randint(1000, (count,)))


if __name__ == "__main__":
    main()
