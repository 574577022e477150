"""The loop, on a real engine, against diffusers' own schedulers stepping the same engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

from sd_engines.engine import open_engine
from sd_engines.errors import ConfigError
from sd_runtime import Request
from sd_runtime.denoise import Row, denoise, predicted_original_sample
from sd_runtime.noise import NoiseStream
from sd_runtime.start import begin
from sd_runtime.table import compile_table
from sd_runtime.task import TEXT_TO_IMAGE
from sd_runtime.timing import Timings
from tiny_onnx import CHANNELS, SIZE, TOKENS, WIDTH, make_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sd_engines.engine import Engine

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "steps_offset": 1,
}
SHAPE = (CHANNELS, SIZE, SIZE)
SEEDS = (3, 2**64 - 1)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    bundle = make_bundle(tmp_path_factory.mktemp("unet") / "bundle")
    with open_engine(bundle, "unet", backend="onnxruntime", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def embeds() -> np.ndarray:
    """Two pictures' negative, then positive prompt_embeds."""
    draw = np.random.default_rng(0)
    return draw.standard_normal((4, TOKENS, WIDTH)).astype(np.float32)


def expected(
    unet: Engine,
    embeds: np.ndarray,
    scheduler: Any,
    *,
    steps: int,
    guider: ClassifierFreeGuidance,
    **step_options: Any,
) -> np.ndarray:
    """diffusers' loop for `SEEDS`, with the engine in the UNet's place."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
    scheduler.set_timesteps(steps)
    sample = torch.cat([torch.randn((1, *SHAPE), generator=g) for g in generators])
    sample = sample * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(sample, timestep).numpy().astype(np.float32)
        guider.set_state(step, len(scheduler.timesteps), timestep)
        predictions = [
            torch.from_numpy(
                unet(
                    sample=scaled,
                    timestep=np.full(len(scaled), timestep, np.float32),
                    encoder_hidden_states=texts,
                )["noise_pred"]
            )
            for texts in (embeds[2:], embeds[:2])[: guider.num_conditions]
        ]
        output = guider.forward(*predictions).pred
        sample = scheduler.step(output, timestep, sample, return_dict=False, **step_options)[0]
    return sample.numpy()


def drawn(
    unet: Engine,
    embeds: np.ndarray,
    *,
    guidance_scale: float,
    start: float = 0.0,
    stop: float = 1.0,
    **table_options: Any,
) -> np.ndarray:
    """Our loop for `SEEDS`."""
    table = compile_table(CONFIG, **table_options)
    request = Request("", guidance_scale=guidance_scale, guidance_start=start, guidance_stop=stop)
    guided_rows = request.guided_rows(table.num_rows)
    noise = [NoiseStream(seed) for seed in SEEDS]
    latents = begin(TEXT_TO_IMAGE, noise, SHAPE, table).latents
    assert latents.dtype == np.float32
    rows = denoise(
        unet,
        latents,
        prompt_embeds=list(embeds[2:]),
        negative_prompt_embeds=list(embeds[:2]) if guided_rows else [],
        guidance_scale=guidance_scale,
        guided_rows=guided_rows,
        table=table,
        noise=noise,
        timings=Timings(),
    )
    for row in rows:
        assert row.latents.dtype == row.sample.dtype == row.model_output.dtype == np.float32
    assert row.index + 1 == table.num_rows
    return row.latents


@pytest.mark.parametrize(
    "guidance",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "start": 0.3, "stop": 0.7},
        {"guidance_scale": 3.0, "stop": 0.1},
    ],
)
@pytest.mark.parametrize(
    ("name", "kind", "stochastic"),
    [
        ("ddim", "DDIMScheduler", False),
        ("pndm", "PNDMScheduler", False),
        ("heun", "HeunDiscreteScheduler", False),
        ("lms", "LMSDiscreteScheduler", False),
        ("unipc", "UniPCMultistepScheduler", False),
        ("euler_a", "EulerAncestralDiscreteScheduler", True),
        ("dpm2_a", "KDPM2AncestralDiscreteScheduler", True),
    ],
)
def test_the_loop_steps_as_diffusers_does(
    unet: Engine,
    embeds: np.ndarray,
    name: str,
    kind: str,
    stochastic: bool,
    guidance: dict[str, float],
) -> None:
    options: dict[str, Any] = {}
    if stochastic:
        options["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
        for generator in options["generator"]:
            torch.randn((1, *SHAPE), generator=generator)  # the first latents, drawn in expected
    scheduler = getattr(diffusers, kind).from_config(CONFIG)
    guider = ClassifierFreeGuidance(**guidance)
    reference = expected(unet, embeds, scheduler, steps=5, guider=guider, **options)
    latents = drawn(unet, embeds, scheduler=name, num_inference_steps=5, **guidance)
    assert np.linalg.norm(latents - reference) <= 1e-4 * np.linalg.norm(reference)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_of_a_row(prediction_type: str) -> None:
    config = {**CONFIG, "prediction_type": prediction_type}
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(4)
    table = compile_table(config, scheduler="ddim", num_inference_steps=4)
    draw = np.random.default_rng(0)
    sample, output = draw.standard_normal((2, 1, *SHAPE)).astype(np.float32)
    for index, timestep in enumerate(scheduler.timesteps):
        level = float(table.alpha[index]), float(table.sigma[index])
        row = Row(index, float(timestep), *level, sample, output, sample)
        reference = scheduler.step(torch.from_numpy(output), timestep, torch.from_numpy(sample))
        np.testing.assert_allclose(
            predicted_original_sample(row, prediction_type),
            reference.pred_original_sample.numpy(),
            rtol=1e-4,
            atol=1e-4,
        )
    with pytest.raises(ConfigError, match="v_prediction"):
        predicted_original_sample(row, "flow")


def unguided(
    unet: Engine, embeds: np.ndarray, *, num_inference_steps: int, timings: Timings
) -> Iterator[Row]:
    """Our loop for one picture, row by row."""
    table = compile_table(CONFIG, scheduler="ddim", num_inference_steps=num_inference_steps)
    noise = [NoiseStream(0)]
    return denoise(
        unet,
        begin(TEXT_TO_IMAGE, noise, SHAPE, table).latents,
        prompt_embeds=[embeds[0]],
        negative_prompt_embeds=[],
        guidance_scale=1.0,
        guided_rows=range(0),
        table=table,
        noise=noise,
        timings=timings,
    )


def test_closing_stops_the_engine(unet: Engine, embeds: np.ndarray) -> None:
    timings = Timings()
    rows = unguided(unet, embeds, num_inference_steps=500, timings=timings)
    assert [next(rows).index for _ in range(3)] == [0, 1, 2]
    rows.close()
    assert len(timings.runs_ms("unet")) == 3


class SlowDevice:
    """A clock of a device that is never done before it is waited for; moments are numbered."""

    def __init__(self) -> None:
        self.asked = 0
        self.waited_for: list[int] = []

    def now(self) -> int:
        self.asked += 1
        return self.asked

    def wait(self, moment: int) -> None:
        self.waited_for.append(moment)

    def seconds(self, moment: int) -> float:
        return moment


def test_a_device_is_two_rows_behind_at_most(unet: Engine, embeds: np.ndarray) -> None:
    """Else all rows are enqueued at once: progress says nothing, and none can be cancelled."""
    device = SlowDevice()
    rows = unguided(unet, embeds, num_inference_steps=5, timings=Timings(device))
    ends, waits = [], []
    for _ in rows:
        ends.append(device.asked)  # the last moment that the row asked for is its end
        waits.append(list(device.waited_for))
    assert waits == [[], [], ends[:1], ends[:2], ends[:3]]
