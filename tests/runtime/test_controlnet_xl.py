"""ControlNets of Stable Diffusion XL, against the unmodified pipelines of diffusers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch

from controlnets import control_picture, control_request
from sd_runtime import Pipeline
from sd_runtime.plan import plan

if TYPE_CHECKING:
    from conftest import TinyModel

# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


picture = partial(control_picture, size=(16, 16))
request_for = partial(control_request, (16, 16))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0, "controlnet_conditioning_scale": (0.0, 0.7)},
        {"negative_prompt": "", "controlnet_conditioning_scale": (0.5, 1.3)},
        {"prompt": ("a cat", "a dog", "a horse"), "negative_prompt": "red"},
        {"control_guidance_start": (0.0, 0.3), "control_guidance_end": (0.6, 1.0)},
        {"guess_mode": True, "scheduler": "euler_a", "num_images_per_prompt": 2},
        {"image": picture(4)},
        {"image": picture(4), "strength": 0.6, "scheduler": "dpm++_2m"},
        {"image": picture(4), "mask": picture(5).convert("L")},
        {"image": picture(4), "mask": picture(5).convert("L"), "strength": 1.0},
    ],
    ids=str,
)
def test_same_picture_as_diffusers(controlled_xl_model: TinyModel, options: dict[str, Any]) -> None:
    controlled_xl_model.assert_same(request_for(**options))


def test_it_is_told_what_the_unet_is_told(controlled_xl_model: TinyModel) -> None:
    manifest = controlled_xl_model.pipeline.bundle.manifest
    unet, net = (manifest.components[name] for name in ("unet", "controlnet_0"))
    assert net.inputs[:5] == unet.inputs[:5]
    assert [spec.name for spec in net.inputs[3:]] == [
        *("pooled_prompt_embeds", "time_ids", "control_embeds", "conditioning_scale")
    ]
    assert unet.inputs[5:] == net.outputs
    proven = {entry.component: entry.figure for entry in manifest.certificate}
    assert proven["end_to_end"] >= 0.999


def test_without_a_control_picture_it_draws_as_the_checkpoint(
    controlled_xl_model: TinyModel,
) -> None:
    controlled_xl_model.assert_same(replace(request_for(), control_image=None))


@pytest.mark.parametrize("share", [0.8, 0.4])
def test_it_leads_the_base_of_a_refiner(
    controlled_xl_model: TinyModel, refiner_model: TinyModel, share: float
) -> None:
    request = request_for(
        num_inference_steps=5, high_noise_frac=share, control_guidance_end=(0.5, 1.0)
    )
    pictures = [control.image for control in request.control_image]
    base = diffusers.StableDiffusionXLControlNetPipeline(
        **controlled_xl_model.oracle.components,
        controlnet=list(controlled_xl_model.controlnets),
        add_watermarker=False,
    )
    base.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": torch.Generator("cpu").manual_seed(8),
    }
    led = {"control_guidance_start": [0.0, 0.0], "control_guidance_end": [0.5, 1.0]}
    latents = base(
        "a cat", image=pictures, denoising_end=share, output_type="latent", **options, **led
    ).images
    (wanted,) = refiner_model.oracle(
        "a cat", image=latents, denoising_start=share, **options
    ).images
    with Pipeline.load(
        controlled_xl_model.bundle, threads=1, refiner=refiner_model.bundle
    ) as pipeline:
        result = pipeline.generate(request)
    difference = np.abs(result.pixels[0].astype(int) - np.asarray(wanted))
    assert (difference <= 1).mean() >= 0.999
    planned = plan(
        request,
        controlled_xl_model.pipeline.bundle.manifest,
        refiner=refiner_model.pipeline.bundle.manifest,
    )
    assert planned.refining is not None
    assert planned.refining.controls == ()
    first, second = ({0, 1}, {0, 1, 2, 3}) if share == 0.8 else ({0, 1}, {0, 1})
    assert [set(control.rows) for control in planned.controls] == [first, second]
