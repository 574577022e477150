"""The one denoising loop: every sampler is a table, and this runs any of them.

    h_i     = p·sample + q·model_output
    sample' = a·sample + Σ_k b[k]·h_{i-k} + c·noise_i

All state is float32 and lives in buffers made before the first row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sd_engines.spec import TIMESTEP_COND
from sd_runtime.arrays import copy_into
from sd_runtime.noise_schedule import Level
from sd_runtime.prediction import x0_prediction
from sd_runtime.timing import clock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from sd_engines.engine import Array, Binding, Engine
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
    negative_prompt_embeds: Sequence[Array],
    guidance_scale: float,
    guided_rows: range,
    table: SchedulerTable,
    noise: Sequence[NoiseStream],
    timings: Timings,
    timestep_cond: NDArray[np.float32] | None = None,
) -> Iterator[Row]:
    """Run ``table`` on ``latents`` float32 [n, c, h, w]; yields after every row.

    Embeddings are [tokens, d], one per picture. On ``guided_rows`` the UNet runs on 2n samples,
    negative first, and on n elsewhere, where nobody reads the negative ones. ``noise`` is one
    stream per picture, read on the rows that draw, used there or not, so that later rows see the
    noise they would see in diffusers. ``timestep_cond`` [d] is for a UNet that takes it: its
    guidance, the same in every row. Closing the generator cancels.
    """
    n = len(latents)
    bindings = {
        guided: _bound(
            unet, [*(negative_prompt_embeds if guided else ()), *prompt_embeds], timestep_cond
        )
        for guided in {row in guided_rows for row in range(table.num_rows)}
    }

    state = np.empty_like(next(iter(bindings.values())).inputs["sample"][:n])
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
        guided = row in guided_rows
        binding = bindings[guided]
        sample_in, noise_pred = binding.inputs["sample"], binding.outputs["noise_pred"]
        before = sample_in[:n]
        before[...] = state
        if guided:
            sample_in[n:] = state
        binding.inputs["timestep"][...] = timestep
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


def _bound(
    unet: Engine, embeds: Sequence[Array], timestep_cond: NDArray[np.float32] | None
) -> Binding:
    """The UNet's buffers for as many rows as there are embeddings, and those written to them."""
    binding = unet.bind(len(embeds))
    if timestep_cond is not None:
        rows_in = binding.inputs[TIMESTEP_COND]
        copy_into(rows_in, np.broadcast_to(timestep_cond, rows_in.shape))
    for row_in, row in zip(binding.inputs["encoder_hidden_states"], embeds, strict=True):
        copy_into(row_in, row)
    return binding


def predicted_original_sample(row: Row, prediction_type: str) -> Array:
    """The picture's latents as the model sees them at ``row`` (x₀), [n, c, h, w], for previews."""
    level = Level(np.float64(row.alpha), np.float64(row.sigma))
    p, q = x0_prediction(prediction_type, level)
    return float(p) * row.sample + float(q) * row.model_output
