"""The one denoising loop: every sampler is a table, and this runs any of them.

    h_i     = p·sample + q·model_output
    sample' = a·sample + Σ_k b[k]·h_{i-k} + c·noise_i

All state is float32 and lives in buffers made before the first row. What a task adds is bound
before it too: further inputs of the UNet, and what an inpainted picture keeps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sd_runtime.arrays import copy_into
from sd_runtime.controlnet import Residuals
from sd_runtime.guidance import SafetyGuidance, guide
from sd_runtime.noise_schedule import Level
from sd_runtime.prediction import x0_prediction
from sd_runtime.update import Update

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence

    from sd_engines.engine import Array, Binding, Engine
    from sd_runtime.controlnet import ControlNet
    from sd_runtime.guidance import Safety
    from sd_runtime.noise import NoiseStream
    from sd_runtime.table import SchedulerTable
    from sd_runtime.timing import Timings
    from sd_runtime.update import Known

_ROWS_AHEAD: Final = 2
"""Rows that a GPU has still to run when the host gives it one more: it never waits, and yet what is
said of progress is true and cancelling stops it soon."""


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
    unet_inputs: Mapping[str, Sequence[Array] | Array] | None = None,
    negative_unet_inputs: Mapping[str, Sequence[Array] | Array] | None = None,
    known: Known | None = None,
    unet_shallow: Engine | None = None,
    shallow_rows: Container[int] = (),
    controlnets: Sequence[ControlNet] = (),
    safety: Safety | None = None,
) -> Iterator[Row]:
    """Run ``table`` on ``latents`` float32 [n, c, h, w]; yields after every row.

    Embeddings are [tokens, d], one per picture. On ``guided_rows`` the UNet runs on 2n samples,
    negative first, and on n elsewhere, where nobody reads the negative ones. On ``shallow_rows``
    ``unet_shallow`` runs instead, on the deep features of the last row that was not; that row must
    be guided if they are, and not if they are not. ``noise`` is one stream per picture, read on
    the rows that draw, used there or not, so that later rows see the noise they would see in
    diffusers. ``unet_inputs`` go to the UNet by name on every row, in both halves: [n, …], or
    [1, …] for all pictures, as numbers [1] always are; ``negative_unet_inputs`` take their place in
    the negative half. Where ``known`` is given, its part of the latents is put back after every
    row, with the noise of the next. What ``controlnets`` say on a row goes into the UNet. Pictures
    whose rows are all guided can be led away from what ``safety`` names. Closing the generator
    cancels.
    """
    n = len(latents)
    engines = {"unet": unet} | ({"unet_shallow": unet_shallow} if unet_shallow else {})
    kinds = [
        ("unet_shallow" if row in shallow_rows else "unet", row in guided_rows)
        for row in range(table.num_rows)
    ]
    positive = {"encoder_hidden_states": prompt_embeds, **(unet_inputs or {})}
    negative = positive | {"encoder_hidden_states": negative_prompt_embeds}
    negative |= negative_unet_inputs or {}
    halves = {False: [positive], True: [negative, positive]}
    bindings = {
        (component, guided): _bound(engines[component], n, halves[guided])
        for component, guided in dict.fromkeys(kinds)
    }
    residuals = {
        guided: Residuals(binding, _controls(controlnets, n, halves[guided]))
        for (component, guided), binding in bindings.items()
        if component == "unet"
    }
    away = None
    if safety is not None:
        beside_concept = _bound(unet, n, [{**positive, **safety.unet_inputs}])
        Residuals(beside_concept, ())
        away = SafetyGuidance(safety.config, beside_concept)
    kept_features = {
        guided: binding.inputs["deep_features"]
        for (component, guided), binding in bindings.items()
        if component == "unet_shallow"
    }

    state = np.empty_like(next(iter(bindings.values())).inputs["sample"][:n])
    copy_into(state, latents)
    update = Update(state, table, known=known)
    model_output = np.empty_like(state)
    drawn = np.empty(state.shape, dtype=np.float32)
    timesteps, alphas, sigmas = table.timesteps.tolist(), table.alpha.tolist(), table.sigma.tolist()
    draws_noise = table.draws_noise.tolist()

    now = timings.now
    enqueued: deque[Any] = deque(maxlen=_ROWS_AHEAD)
    for row, timestep in enumerate(timesteps):
        if len(enqueued) == _ROWS_AHEAD:
            timings.wait(enqueued[0])
        start = now()
        component, guided = kinds[row]
        binding = bindings[component, guided]
        sample_in, noise_pred = binding.inputs["sample"], binding.outputs["noise_pred"]
        before = sample_in[:n]
        before[...] = state
        if len(sample_in) > n:  # rows that do not share it
            sample_in[n:] = state
        binding.inputs["timestep"][...] = timestep
        ready = now()
        timings.add("model_input", start, ready)
        if component == "unet" and residuals[guided].update(row):
            controlled = now()
            timings.add("controlnet", ready, controlled)
            ready = controlled
        binding.run()
        if component == "unet" and guided in kept_features:
            copy_into(kept_features[guided], binding.outputs["deep_features"])
        if away is not None:
            away.run(before, timestep)
        done = now()
        if guided:
            guide(noise_pred, guidance_scale, out=model_output, row=row, safety=away)
        else:
            model_output[...] = noise_pred
        if draws_noise[row]:
            for picture, stream in enumerate(noise):
                drawn[picture] = stream.normal((1, *drawn.shape[1:]))[0]
        update.apply(row, model_output, noise=drawn if draws_noise[row] else None)
        timings.add(component, ready, done)
        enqueued.append(now())
        timings.add("scheduler", done, enqueued[-1])
        yield Row(row, timestep, alphas[row], sigmas[row], before, model_output, state)


def _bound(
    unet: Engine, n: int, halves: Sequence[Mapping[str, Sequence[Array] | Array]]
) -> Binding:
    """The UNet's buffers for n pictures in each of ``halves``, and what holds for all rows in them.

    A half's inputs are repeated until all n have one. What is made like the UNet takes what it has
    a place for: a shallow one whose layers do not look at the prompt has none for the embeddings.
    """
    binding = unet.bind(n * len(halves), pictures=n)
    for number, half in enumerate(halves):
        for name, rows in half.items():
            if name not in binding.inputs:
                continue
            rows_in = binding.inputs[name][n * number : n * (number + 1)]
            if rows_in.ndim == 1:
                rows_in[...] = rows[0].item()
                continue
            for index, row_in in enumerate(rows_in):
                copy_into(row_in, rows[index % len(rows)])
    return binding


def _controls(
    controlnets: Sequence[ControlNet],
    n: int,
    halves: Sequence[Mapping[str, Sequence[Array] | Array]],
) -> list[tuple[ControlNet, Binding]]:
    """``controlnets`` with their buffers, as `_bound`; the last half is that of the prompt."""
    bound = []
    for net in controlnets:
        inputs = [
            {
                **half,
                "control_embeds": net.embeds,
                "conditioning_scale": net.conditioning_scale(negative=half is not halves[-1]),
            }
            for half in halves
        ]
        bound.append((net, _bound(net.engine, n, inputs)))
    return bound


def predicted_original_sample(row: Row, prediction_type: str) -> Array:
    """The picture's latents as the model sees them at ``row`` (x₀), [n, c, h, w], for previews."""
    level = Level(np.float64(row.alpha), np.float64(row.sigma))
    p, q = x0_prediction(prediction_type, level)
    return float(p) * row.sample + float(q) * row.model_output
