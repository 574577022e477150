"""Distils the shipped checkpoint into a LoRA that draws in few steps, and without guidance.

``python benchmarks/shapes/train_few_step_lora.py CHECKPOINT OUTPUT`` writes a file of diffusers'
kind, for LCM's scheduler: from wherever a picture has got to, its UNet says at once how it ends.
What it learns from are ends that the UNet without it came to by guided steps (Luhman & Luhman 2021,
arXiv:2101.02388, but from every level of noise), so that it need not be its own teacher.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from descent import Descent
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from train_text_encoder import token_ids
from train_unet import encode_scenes

from sd_bench.scene import caption

if TYPE_CHECKING:
    from collections.abc import Iterator

RANK = 32
LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
]
GUIDANCE_SCALE = 3.0
LEVELS = np.arange(1, 51) * 20 - 1
"""Timesteps that LCM's scheduler takes its own from."""
PURE_NOISE_SHARE = 0.3
"""Of the lessons; every picture begins there."""
TIMESTEPS_A_STEP = 60
"""Of the teacher, which is a solver of second order: 17 steps from pure noise."""
EMA_DECAY = 0.998


class Lesson(NamedTuple):
    """Samples at one timestep, and the latents that they end as; text by its token ids."""

    timestep: int
    samples: torch.Tensor
    input_ids: torch.Tensor
    ends: torch.Tensor


class Teacher:
    """The checkpoint as it is, its captions and its latents."""

    def __init__(self, pipeline: StableDiffusionPipeline, *, scenes: int, batch_size: int) -> None:
        self._pipeline = pipeline
        self._rng = np.random.default_rng(0)
        vae = pipeline.vae.to(memory_format=torch.channels_last)
        self._scenes, means, _ = encode_scenes(vae, count=scenes, seed=0)
        self._latents = means.float() * vae.config.scaling_factor
        self._noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self._batch_size = batch_size

    def lessons(self, *, minutes: float) -> Iterator[Lesson]:
        """As many as there is time for."""
        started = time.time()
        while time.time() - started < 60 * minutes:
            pure = self._rng.random() < PURE_NOISE_SHARE
            yield self._lesson(int(LEVELS[-1] if pure else self._rng.choice(LEVELS)))

    @torch.no_grad()
    def _lesson(self, timestep: int) -> Lesson:
        rows = torch.from_numpy(self._rng.integers(len(self._scenes), size=self._batch_size))
        words = [caption(self._scenes[row], self._rng) for row in rows]
        samples = torch.randn(self._latents[rows].shape)
        if timestep < LEVELS[-1]:
            at = torch.full((self._batch_size,), timestep)
            samples = self._noise_schedule.add_noise(self._latents[rows], samples, at)
        input_ids = token_ids(self._pipeline.tokenizer, words + [""] * len(words))
        ends = self._ends(samples, timestep, input_ids)
        return Lesson(timestep, samples, input_ids[: len(words)], ends)

    def _ends(self, samples: torch.Tensor, timestep: int, input_ids: torch.Tensor) -> torch.Tensor:
        solver = DPMSolverMultistepScheduler.from_config(self._pipeline.scheduler.config)
        count = max(2, math.ceil(timestep / TIMESTEPS_A_STEP))
        solver.set_timesteps(timesteps=np.linspace(timestep, 0, count + 1).round()[:-1])
        unet = self._pipeline.unet
        with torch.autocast("cpu", torch.bfloat16):
            embeds = self._pipeline.text_encoder(input_ids).last_hidden_state
        for step in solver.timesteps:
            both = samples.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                following, without = unet(both, step, embeds).sample.float().chunk(2)
            guided = without + GUIDANCE_SCALE * (following - without)
            samples = solver.step(guided, step, samples).prev_sample
        return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path, help="a folder, which keeps the lessons too")
    parser.add_argument("--lesson-minutes", type=float, default=30, help="of preparing lessons")
    parser.add_argument("--minutes", type=float, default=30, help="of learning from them")
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(
        args.checkpoint, torch_dtype=torch.float32, safety_checker=None
    )
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    unet.requires_grad_(False)
    unet.to(memory_format=torch.channels_last)
    kept = args.output / "lessons.pt"
    if not kept.is_file():
        teacher = Teacher(pipeline, scenes=args.scenes, batch_size=args.batch_size)
        args.output.mkdir(parents=True, exist_ok=True)
        torch.save([tuple(x) for x in teacher.lessons(minutes=args.lesson_minutes)], kept)
    lessons = [Lesson(*values) for values in torch.load(kept)]
    print(f"{len(lessons)} lessons of {args.batch_size}", flush=True)

    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    unet.to(memory_format=torch.channels_last)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0, betas=(0.9, 0.99), weight_decay=0.01)
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    descent = Descent(optimizer, minutes=args.minutes, learning_rate=args.learning_rate, warm_up=50)
    running, reported = 0.0, time.time()
    for progress in descent:
        timesteps, samples, input_ids, ends = mixed(lessons, args.batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                embeds = text_encoder(input_ids).last_hidden_state
            v = unet(samples, timesteps, embeds).sample.float()
        alphas = noise_schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        loss = (alphas.sqrt() * samples - (1 - alphas).sqrt() * v - ends).square().mean()
        descent.step(loss)
        decay = min(EMA_DECAY, descent.steps / (descent.steps + 10))
        for average, parameter in zip(averages, parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - decay)
        running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
        if time.time() - reported > 60:
            reported = time.time()
            print(f"{progress:4.0%} step {descent.steps} loss {running:.4f}", flush=True)
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    state = {
        k: v.to(torch.float16).contiguous() for k, v in get_peft_model_state_dict(unet).items()
    }
    pipeline.save_lora_weights(args.output, unet_lora_layers=state)


def mixed(
    lessons: list[Lesson], count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Timesteps, samples, token ids and ends of ``count`` rows of any lessons."""
    chosen = [lessons[n] for n in torch.randint(len(lessons), (count,))]
    rows = torch.randint(len(chosen[0].samples), (count,)).tolist()
    samples, input_ids, ends = (
        torch.stack([getattr(lesson, name)[row] for lesson, row in zip(chosen, rows, strict=True)])
        for name in ("samples", "input_ids", "ends")
    )
    samples = samples.contiguous(memory_format=torch.channels_last)
    return torch.tensor([lesson.timestep for lesson in chosen]), samples, input_ids, ends


if __name__ == "__main__":
    main()
