"""The door for clients of AUTOMATIC1111's web UI."""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from pictures import picture_of, png
from sd_runtime import Request
from sd_runtime.scheduler_config import SCHEDULERS, scheduler_name
from sd_runtime.serve.a1111_bodies import ImageToImage, TextToImage
from sd_runtime.serve.offer import Offer

if TYPE_CHECKING:
    from conftest import TinyModel

    from .conftest import Reply, Server


PLAIN = png(Image.new("RGB", (2, 2)))
BODY = {"prompt": "a cat", "negative_prompt": "red", "seed": 5, "steps": 3, "cfg_scale": 4}


def test_pictures_are_the_pipelines_own(tiny_model: TinyModel, server: Server) -> None:
    body = BODY | {"sampler_name": "DPM++ 2M", "scheduler": "Karras", "batch_size": 2, "n_iter": 1}
    reply = server.ask("/sdapi/v1/txt2img", body)
    assert reply.status == 200
    request = Request(
        "a cat",
        negative_prompt="red",
        seed=5,
        num_inference_steps=3,
        guidance_scale=4,
        scheduler="dpm++_2m_karras",
        num_images_per_prompt=2,
        prompt_weighting=True,
    )
    own = tiny_model.pipeline.generate(request)
    info = json.loads(reply.json["info"])
    assert info["all_seeds"] == [5, 6]
    assert info["infotexts"] == [recipe.parameters() for recipe in own.recipes]
    for text, expected in zip(reply.json["images"], own.pixels, strict=True):
        picture = np.asarray(picture_of(text))
        assert np.abs(picture.astype(int) - expected).max() <= 1
        read = server.ask("/sdapi/v1/png-info", {"image": f"data:image/png;base64,{text}"})
        assert read.json["info"] in info["infotexts"]


@pytest.mark.parametrize("format_", ["JPEG", "WEBP"])
def test_png_info_reads_the_other_formats(
    tiny_model: TinyModel, server: Server, format_: str
) -> None:
    result = tiny_model.pipeline.generate(Request("a cät", seed=1, num_inference_steps=1))
    text = base64.b64encode(result.encode(0, format_)).decode()
    reply = server.ask("/sdapi/v1/png-info", {"image": text})
    assert reply.json["info"] == result.recipes[0].parameters()


def enlarged(data: bytes, side: int) -> str:
    """A PNG whose header claims more pixels than it has."""
    header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    return base64.b64encode(
        data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    ).decode()


def test_png_info_of_a_plain_picture_is_empty(server: Server) -> None:
    lines = base64.encodebytes(PLAIN).decode()
    assert lines.count("\n") > 1
    reply = server.ask("/sdapi/v1/png-info", {"image": lines})
    assert reply.json == {"info": "", "items": {}}


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("http://127.0.0.1/picture.png", "URLs are not read"),
        ("aGVsbG8=", "cannot be read: it is no PNG, JPEG or WebP\nSend"),
        (enlarged(PLAIN, 9000), "9000×9000 pixels"),
        (enlarged(PLAIN, 60_000), "cannot be read"),
        (base64.b64encode(PLAIN[:45]).decode(), "cannot be read"),
    ],
)
def test_png_info_refuses_what_is_no_picture(server: Server, image: str, words: str) -> None:
    reply = server.ask("/sdapi/v1/png-info", {"image": image})
    assert reply.status == 400
    assert words in reply.json["detail"]
    assert reply.json["errors"]


def test_a_wrong_request_says_what_to_do(server: Server) -> None:
    for wrong, words in (
        ({"sampler_name": "Eulr a"}, "Did you mean 'euler_a'"),
        ({"enable_hr": True, "hr_scale": 2}, "enable_hr is True, which this server cannot do"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True]}}}, "'ADetailer' in alwayson_scripts"),
        ({"alwayson_scripts": {"ADetailer": [True]}}, "'ADetailer' in alwayson_scripts"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"image": ""}]}}}, "has no ControlNet"),
        ({"stepps": 3}, "Did you mean 'steps'"),
        ({"width": 512, "height": 512}, "draws 64×64"),
        ({"steps": 41}, "Ask for 40 at most"),
        ({"scheduler": "Nonsense"}, "scheduler is 'Nonsense' without a sampler"),
        ({"scheduler": "Karras"}, "Send the sampler_name"),
        ({"sampler_name": "Euler a", "scheduler": "Karras"}, "'Euler a' has no scheduler 'Karras'"),
        ({"sampler_name": "Eulr a", "scheduler": "Karras"}, "unknown scheduler"),
        ({"prompt": "a cat <lora:style:0.8>"}, "sd-serve --lora FILE=SCALE"),
        ({"prompt": f"(a cat:1{'0' * 39})"}, "counts 1e+39 times"),
        ({"prompt": "(" * 3999 + "a"}, "nested brackets multiply"),
        ({"subseed": 3, "subseed_strength": 0.5}, "subseed_strength is 0.5"),
        ({"script_args": ["A" * 10**6]}, "which this server cannot do"),
        ({"infotext": "Steps: 3"}, "infotext is 'Steps: 3', which this server cannot do"),
    ):
        reply = server.ask("/sdapi/v1/txt2img", BODY | wrong)
        assert reply.status == 400
        assert words in reply.json["detail"]
        assert len(reply.body) < 10_000
    neutral = {"enable_hr": False, "override_settings": {}, "subseed": -1, "styles": None}
    neutral["alwayson_scripts"] = {"ControlNet": {"args": []}, "Refiner": None, "Seed": []}
    neutral |= {"hr_scale": 2, "hr_upscaler": "Latent", "firstphase_width": 0}
    neutral |= {"denoising_strength": 0.35, "refiner_switch_at": 0.8, "subseed_strength": 0}
    neutral |= {"force_task_id": None, "firstpass_image": None, "infotext": None, "subseed": 42}
    assert server.ask("/sdapi/v1/txt2img", BODY | neutral).status == 200


@pytest.mark.parametrize("path", ["/sdapi/v1/txt2img", "/v1/images/generations"])
def test_a_field_that_is_sent_twice_is_refused(server: Server, path: str) -> None:
    reply = server.ask(path, b'{"prompt": "a cat", "prompt": "a dog"}')
    assert reply.status == 400
    assert "an object names one field twice\\nSend JSON" in reply.body.decode()
    assert server.ask(path, b'{"prompt": ').status == 400


@pytest.fixture
def offer(tiny_model: TinyModel) -> Offer:
    return Offer.from_pipeline(tiny_model.pipeline, max_images=4, max_steps=40)


@pytest.mark.parametrize(
    ("sampler", "spacing", "scheduler"),
    [
        ("DPM++ 2M", None, "DPM++ 2M_karras"),
        ("DPM++ 2M", "Automatic", "DPM++ 2M_karras"),
        ("DPM++ 2M", "Uniform", "DPM++ 2M"),
        ("DPM++ 2M", "Beta", "DPM++ 2M_beta"),
        ("DPM2 a", "automatic", "DPM2 a_karras"),
        ("DPM++ 2M SDE", None, "DPM++ 2M SDE_exponential"),
        ("DPM++ 3M SDE", "", "DPM++ 3M SDE_exponential"),
        ("DPM++ 2M Karras", "Karras", "DPM++ 2M Karras"),
        ("Euler a", "Automatic", "Euler a"),
        ("dpm++_2m", "Automatic", "dpm++_2m"),  # as /samplers lists it
        (None, "Automatic", None),
        (None, "Normal", None),
    ],
)
def test_schedulers_are_those_of_the_web_ui(
    offer: Offer, sampler: str | None, spacing: str | None, scheduler: str | None
) -> None:
    body = TextToImage.model_validate({"sampler_name": sampler, "scheduler": spacing})
    request = body.request(offer)
    assert request.scheduler == scheduler
    assert scheduler is None or scheduler_name(scheduler) in SCHEDULERS


def test_null_means_the_default(offer: Offer) -> None:
    nulls = dict.fromkeys((*TextToImage.model_fields, *TextToImage.neutral))
    assert TextToImage.model_validate(nulls) == TextToImage.model_validate({})
    started = {"init_images": [base64.b64encode(PLAIN).decode()]}
    nulls = dict.fromkeys((*ImageToImage.model_fields, *ImageToImage.neutral)) | started
    assert ImageToImage.model_validate(nulls).request(offer).strength == 0.75


EVERY_FIELD = {
    **{"prompt": "", "negative_prompt": "", "styles": [], "seed": -1, "subseed": -1},
    **{"subseed_strength": 0, "seed_resize_from_h": -1, "seed_resize_from_w": -1},
    **{"sampler_name": None, "scheduler": None, "batch_size": 1, "n_iter": 1, "steps": 20},
    **{"cfg_scale": 7.0, "width": 64, "height": 64, "restore_faces": False, "tiling": False},
    **{"do_not_save_samples": False, "do_not_save_grid": False, "eta": 0, "s_min_uncond": 0},
    **{"denoising_strength": 0.75, "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1.0},
    **{"override_settings": {}, "override_settings_restore_afterwards": True, "comments": {}},
    **{"refiner_checkpoint": None, "refiner_switch_at": 0, "disable_extra_networks": False},
    **{"firstpass_image": "", "force_task_id": "", "sampler_index": "Euler", "script_name": ""},
    **{"script_args": [], "send_images": True, "save_images": False, "alwayson_scripts": {}},
    "infotext": "",
}
"""Of either task, as the /docs of that web UI list them, so that they change nothing."""
OF_TEXT_TO_IMAGE = {
    **{"enable_hr": False, "firstphase_width": 0, "firstphase_height": 0, "hr_scale": 2.0},
    **{"hr_upscaler": "", "hr_second_pass_steps": 0, "hr_resize_x": 0, "hr_resize_y": 0},
    **{"hr_checkpoint_name": "", "hr_sampler_name": "", "hr_scheduler": "", "hr_prompt": ""},
    "hr_negative_prompt": "",
}
OF_IMAGE_TO_IMAGE = {
    **{"resize_mode": 0, "image_cfg_scale": 0, "mask": "", "mask_blur_x": 4, "mask_blur_y": 4},
    **{"mask_blur": 0, "mask_round": True, "inpainting_fill": 0, "inpaint_full_res": True},
    **{"inpaint_full_res_padding": 0, "inpainting_mask_invert": 0, "latent_mask": ""},
    **{"initial_noise_multiplier": 0, "include_init_images": False},
}


def test_a_client_may_send_every_field_that_the_web_ui_has(offer: Offer) -> None:
    body = {**EVERY_FIELD, **OF_TEXT_TO_IMAGE}
    plain = {"num_inference_steps": 20, "guidance_scale": 7.0, "prompt_weighting": True}
    request = TextToImage.model_validate(body).request(offer)
    size = {"width": 64, "height": 64}
    assert request == Request("", scheduler="Euler", eta=0.0, **plain, **size)
    picture = base64.b64encode(PLAIN).decode()
    body = {**EVERY_FIELD, **OF_IMAGE_TO_IMAGE, "init_images": [picture]}
    request = ImageToImage.model_validate(body).request(offer)
    assert (request.strength, request.mask) == (0.75, None)


def test_the_pictures_are_as_many_and_as_large_as_asked(offer: Offer) -> None:
    body = {"prompt": "a cat", "batch_size": 2, "n_iter": 2, "width": 40, "height": 24}
    request = TextToImage.model_validate(body).request(offer)
    assert (request.num_images, request.width, request.height) == (4, 40, 24)
    assert TextToImage.model_validate({"prompt": "a cat"}).request(offer).num_images == 1


def test_prompts_are_read_as_the_web_ui_reads_them(offer: Offer) -> None:
    for negative, expected in ((None, None), ("", None), ("red", "red")):
        body = TextToImage.model_validate({"prompt": "(a cat:1.2)", "negative_prompt": negative})
        request = body.request(offer)
        assert request.prompt_weighting
        assert request.negative_prompt == expected  # None: zeros to XL, else empty text


def test_what_is_there_to_choose_from(server: Server) -> None:
    names = [sampler["name"] for sampler in server.ask("/sdapi/v1/samplers").json]
    reply = server.ask("/sdapi/v1/txt2img", BODY | {"sampler_name": names[-1], "seed": -1})
    assert reply.status == 200
    (model,) = server.ask("/sdapi/v1/sd-models").json
    assert server.ask("/sdapi/v1/options").json["sd_model_checkpoint"] == model["title"]


def test_progress_shows_the_picture_until_an_interrupt(server: Server) -> None:
    assert server.ask("/sdapi/v1/progress").json["progress"] == 0
    replies: list[Reply] = []
    body = BODY | {"steps": 40, "batch_size": 40}
    thread = threading.Thread(target=lambda: replies.append(server.ask("/sdapi/v1/txt2img", body)))
    thread.start()
    seen = []
    while not (seen and seen[-1]["current_image"]):
        assert not replies, replies[0].body
        seen.append(server.ask("/sdapi/v1/progress").json)
        time.sleep(0.005)
    assert picture_of(seen[-1]["current_image"]).size == (64, 64)
    assert 0 < seen[-1]["progress"] < 1
    assert seen[-1]["state"]["sampling_steps"] == 20 * 41  # PNDM takes one more
    assert server.ask("/sdapi/v1/interrupt", {}).status == 200
    thread.join(60)
    assert replies[0].status == 409
    assert replies[0].json["error"] == "cancelled"
    assert server.ask("/sdapi/v1/progress?skip_current_image=true").json["current_image"] is None
