"""The one denoising loop: every sampler is a table, and this runs any of them.

    h_i     = p·sample + q·model_output
    sample' = a·sample + Σ_k b[k]·h_{i-k} + c·noise_i

All state is float32 and lives in buffers made before the first row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sd_runtime.arrays import copy_into
from sd_runtime.noise_schedule import Level
from sd_runtime.prediction import x0_prediction
from sd_runtime.timing import clock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sd_engines.engine import Array, Engine
    from sd_runtime.noise import NoiseStream
    from sd_runtime.table import SchedulerTable
    from sd_runtime.timing import Timings


@dataclass(frozen=True)
class Row:
    """One UNet call. The arrays are the loop's own: good until the next row, copy to keep.

    ``sample`` [n, c, h, w] went in, ``model_output`` (guided) came out, ``latents`` is what the
    solver made of them; all in the variance-preserving scale.
    """

    index: int
    timestep: float
    alpha: float
    sigma: float
    sample: Array
    model_output: Array
    latents: Array


def initial_latents(
    noise: Sequence[NoiseStream], shape: tuple[int, ...], table: SchedulerTable
) -> Array:
    """float32 [len(noise), *shape]: each picture's first noise, at the table's first level."""
    latents = np.stack([stream.normal((1, *shape))[0] for stream in noise])
    latents *= table.init_noise_scale
    return latents


def denoise(
    unet: Engine,
    latents: Array,
    *,
    prompt_embeds: Sequence[Array],
    negative_prompt_embeds: Sequence[Array] | None,
    guidance_scale: float,
    table: SchedulerTable,
    noise: Sequence[NoiseStream],
    timings: Timings,
) -> Iterator[Row]:
    """Run ``table`` on ``latents`` float32 [n, c, h, w]; yields after every row.

    Embeddings are [tokens, d], one per picture. Without negative ones the UNet runs on n rows,
    otherwise on 2n, negative first. ``noise`` is one stream per picture, read on the rows that
    draw, used there or not, so that later rows see the noise they would see in diffusers.
    Closing the generator cancels.
    """
    n = len(latents)
    guided = negative_prompt_embeds is not None
    binding = unet.bind(2 * n if guided else n)
    sample_in, timestep_in = binding.inputs["sample"], binding.inputs["timestep"]
    noise_pred = binding.outputs["noise_pred"]
    embeds_in = binding.inputs["encoder_hidden_states"]
    for row_in, embeds in enumerate([*(negative_prompt_embeds or ()), *prompt_embeds]):
        copy_into(embeds_in[row_in], embeds)

    before = sample_in[:n]
    state = np.empty_like(before)
    copy_into(state, latents)
    scratch, model_output = np.empty_like(state), np.empty_like(state)
    drawn = np.empty(state.shape, dtype=np.float32)
    depth = table.coef_history.shape[1]
    history = [np.empty_like(state) for _ in range(depth)]

    # Python floats keep float32 arrays float32; numpy's float64 scalars would widen them.
    timesteps, alphas, sigmas = table.timesteps.tolist(), table.alpha.tolist(), table.sigma.tolist()
    p, q, a = table.pred_sample.tolist(), table.pred_output.tolist(), table.coef_sample.tolist()
    b, c = table.coef_history.tolist(), table.coef_noise.tolist()
    draws_noise = table.draws_noise.tolist()

    for row, timestep in enumerate(timesteps):
        start = clock()
        before[...] = state
        if guided:
            sample_in[n:] = state
        timestep_in[...] = timestep
        ready = clock()
        binding.run()
        done = clock()
        if guided:
            np.subtract(noise_pred[n:], noise_pred[:n], out=model_output)
            model_output *= guidance_scale
            model_output += noise_pred[:n]
        else:
            model_output[...] = noise_pred
        newest = history[row % depth]
        np.multiply(before, p[row], out=newest)
        np.multiply(model_output, q[row], out=scratch)
        newest += scratch
        state *= a[row]
        for age, weight in enumerate(b[row]):
            if weight:
                np.multiply(history[(row - age) % depth], weight, out=scratch)
                state += scratch
        if draws_noise[row]:
            for picture, stream in enumerate(noise):
                drawn[picture] = stream.normal((1, *drawn.shape[1:]))[0]
            copy_into(scratch, drawn)
            scratch *= c[row][0]
            state += scratch
        timings.add("model_input", start, ready)
        timings.add("unet", ready, done)
        timings.add("scheduler", done, clock())
        yield Row(row, timestep, alphas[row], sigmas[row], before, model_output, state)


def predicted_original_sample(row: Row, prediction_type: str) -> Array:
    """The picture's latents as the model sees them at ``row`` (x₀), [n, c, h, w], for previews."""
    level = Level(np.float64(row.alpha), np.float64(row.sigma))
    p, q = x0_prediction(prediction_type, level)
    return float(p) * row.sample + float(q) * row.model_output
