"""The door for clients of AUTOMATIC1111's web UI."""

from __future__ import annotations

import base64
import io
import json
import struct
import threading
import time
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from sd_runtime import Request

if TYPE_CHECKING:
    from conftest import TinyModel

    from .conftest import Reply, Server


def plain_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    return buffer.getvalue()


PLAIN = plain_png()
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
    )
    own = tiny_model.pipeline.generate(request)
    info = json.loads(reply.json["info"])
    assert info["all_seeds"] == [5, 6]
    assert info["infotexts"] == [recipe.parameters() for recipe in own.recipes]
    for text, expected in zip(reply.json["images"], own.pixels, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
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
    reply = server.ask("/sdapi/v1/png-info", {"image": base64.b64encode(PLAIN).decode()})
    assert reply.json == {"info": "", "items": {}}


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("http://127.0.0.1/picture.png", "URLs are not read"),
        ("aGVsbG8=", "cannot be read"),
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
        ({"alwayson_scripts": {"controlnet": {"args": [{"image": ""}]}}}, "has no ControlNet"),
        ({"stepps": 3}, "Did you mean 'steps'"),
        ({"width": 512, "height": 512}, "draws 64×64"),
        ({"steps": 41}, "Ask for 40 at most"),
    ):
        reply = server.ask("/sdapi/v1/txt2img", BODY | wrong)
        assert reply.status == 400
        assert words in reply.json["detail"]
    neutral = {"enable_hr": False, "override_settings": {}, "subseed": -1, "styles": None}
    neutral["alwayson_scripts"] = {"ControlNet": {"args": []}}
    neutral |= {"hr_scale": 2, "hr_upscaler": "Latent", "firstphase_width": 0}
    assert server.ask("/sdapi/v1/txt2img", BODY | neutral).status == 200


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
    picture = Image.open(io.BytesIO(base64.b64decode(seen[-1]["current_image"])))
    assert picture.size == (64, 64)
    assert 0 < seen[-1]["progress"] < 1
    assert seen[-1]["state"]["sampling_steps"] == 20 * 41  # PNDM takes one more
    assert server.ask("/sdapi/v1/interrupt", {}).status == 200
    thread.join(60)
    assert replies[0].status == 409
    assert replies[0].json["error"] == "cancelled"
    assert server.ask("/sdapi/v1/progress?skip_current_image=true").json["current_image"] is None
