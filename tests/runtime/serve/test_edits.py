"""Starting from a picture over HTTP, in both dialects: the pipeline's own pictures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from PIL import Image, ImageDraw, ImageOps

from pictures import picture_of, png, text
from sd_runtime import Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import TinyModel

    from .conftest import Server

EXTRA = {"seed": 7, "num_inference_steps": 4, "scheduler": "euler_a", "guidance_scale": 3}
PICTURE = Image.radial_gradient("L").resize((64, 64)).convert("RGB")


def white_square() -> Image.Image:
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((16, 16, 47, 47), fill=255)
    return mask


MASK = white_square()


def hole(mask: Image.Image) -> Image.Image:
    """The same mask as OpenAI's clients draw it: see-through where it is white."""
    rgba = Image.new("RGBA", mask.size, "red")
    rgba.putalpha(mask.point(lambda value: 255 - value))
    return rgba


def assert_shows(b64_json: str | None, expected: np.ndarray) -> None:
    picture = np.asarray(picture_of(b64_json))
    assert np.abs(picture.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mask", [None, MASK, hole(MASK)], ids=["none", "white", "see-through"])
@pytest.mark.parametrize("listed", [False, True])
def test_openais_client_edits(
    tiny_model: TinyModel, server: Server, mask: Image.Image | None, listed: bool
) -> None:
    file = ("picture.png", png(PICTURE))
    options: dict[str, Any] = {} if mask is None else {"mask": ("mask.png", png(mask))}
    with server.client() as client:
        answer = client.images.edit(
            image=[file] if listed else file,
            prompt="a cat",
            n=2,
            extra_body={**EXTRA, "strength": 0.7},
            **options,
        )
    request = Request("a cat", image=PICTURE, strength=0.7, num_images_per_prompt=2, **EXTRA)
    if mask is not None:
        request = Request(
            "a cat", image=PICTURE, mask=MASK, strength=0.7, num_images_per_prompt=2, **EXTRA
        )
    own = tiny_model.pipeline.generate(request)
    for image, expected in zip(answer.data, own.pixels, strict=True):
        assert_shows(image.b64_json, expected)


def test_a_stream_of_an_edit(server: Server) -> None:
    with server.client() as client:
        events = list(
            client.images.edit(
                image=("picture.png", png(PICTURE)),
                prompt="a cat",
                stream=True,
                partial_images=1,
                extra_body=EXTRA,
            )
        )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_large_picture_needs_no_disk(tiny_model: TinyModel, start: Callable[..., Any]) -> None:
    """As in a container whose root can only be read."""
    noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8)
    picture = png(Image.fromarray(noise))
    assert len(picture) > 2**20
    no_disk = "import tempfile; tempfile.tempdir = '/nowhere'; "
    with (
        start(tiny_model.bundle, "--threads", 1, before=no_disk) as server,
        server.client() as client,
    ):
        answer = client.images.edit(image=("a.png", picture), prompt="a cat", extra_body=EXTRA)
        assert len(answer.data) == 1


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("colour", [None, "white", "black"])
def test_img2img_of_the_web_uis_clients(
    tiny_model: TinyModel, server: Server, inverted: bool, colour: str | None
) -> None:
    mask = ImageOps.invert(MASK) if inverted else MASK
    if colour is not None:  # strokes on nothing
        mask, alpha = Image.new("RGBA", mask.size, colour), mask
        mask.putalpha(alpha)
    body = {
        "prompt": "a cat",
        "init_images": [text(PICTURE)],
        "mask": f"data:image/png;base64,{text(mask)}",
        "inpainting_mask_invert": int(inverted),
        "mask_blur": 0,
        "inpainting_fill": 1,
        "inpaint_full_res": False,
        "resize_mode": 0,
        "steps": 4,
        "seed": 7,
        "cfg_scale": 3,
        "sampler_name": "Euler a",
    }
    reply = server.ask("/sdapi/v1/img2img", body)
    assert reply.status == 200, reply.body
    own = tiny_model.pipeline.generate(
        Request("a cat", image=PICTURE, mask=MASK, strength=0.75, prompt_weighting=True, **EXTRA)
    )
    assert_shows(reply.json["images"][0], own.pixels[0])
    assert json.loads(reply.json["info"])["infotexts"] == [own.recipes[0].parameters()]
    assert not {"init_images", "mask"} & set(reply.json["parameters"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "init_images: Field required"),
        ({"init_images": []}, "at least 1 item"),
        ({"init_images": [text(PICTURE)] * 2}, "at most 1 item"),
        ({"init_images": ["http://127.0.0.1/picture.png"]}, "URLs are not read"),
        ({"init_images": ["aGVsbG8="]}, "cannot be read"),
        ({"init_images": [text(PICTURE)[:200]]}, "cannot be read"),
        ({"init_images": [text(hole(MASK))]}, "see-through parts"),
        ({"init_images": [text(PICTURE)], "denoising_strength": 1.5}, "less than or equal to 1"),
        ({"init_images": [text(PICTURE)], "mask": text(MASK), "mask_blur": 4}, "Send 0: masks"),
        ({"init_images": [text(PICTURE)], "mask": text(MASK), "mask_blur_x": 4}, "mask_blur_x is"),
        ({"init_images": [text(PICTURE)], "mask": text(MASK), "inpainting_fill": 0}, "Send 1: mas"),
        (
            {"init_images": [text(PICTURE)], "mask": text(MASK), "inpaint_full_res": True},
            "inpaint_full_res is True",
        ),
        ({"init_images": [text(PICTURE)], "mask": text(MASK), "mask_round": False}, "mask_round"),
        ({"init_images": [text(PICTURE)], "mask": text(MASK.resize((8, 8)))}, "8×8"),
        ({"init_images": [text(PICTURE)], "resize_mode": 2}, "resize_mode is 2"),
    ],
)
def test_a_wrong_img2img_says_what_to_do(server: Server, body: dict[str, Any], words: str) -> None:
    reply = server.ask("/sdapi/v1/img2img", {"prompt": "a cat", "steps": 4, **body})
    assert reply.status == 400, reply.body
    assert words in reply.json["detail"] + reply.json["errors"]


@pytest.mark.parametrize(
    ("image", "options", "words"),
    [
        (b"hello", {}, "cannot be read"),
        (png(PICTURE)[:100], {}, "cannot be read"),
        (png(hole(MASK)), {}, "see-through parts"),
        (png(PICTURE), {"strength": 0}, "strength"),
        (png(PICTURE), {"strength": "half"}, "strength: Input should be a valid number"),
        (png(PICTURE), {"strenght": 0.5}, "Did you mean 'strength'"),
        (png(PICTURE), {"input_fidelity": "high"}, "input_fidelity is 'high'"),
        (png(PICTURE), {"num_inference_steps": 41}, "Ask for 40 at most"),
    ],
)
def test_a_wrong_edit_says_what_to_do(
    server: Server, image: bytes, options: dict[str, Any], words: str
) -> None:
    with (
        server.client() as client,
        pytest.raises(openai.BadRequestError, match=words),
    ):
        client.images.edit(image=("a.png", image), prompt="a cat", extra_body={**EXTRA, **options})


def test_several_pictures_are_refused(server: Server) -> None:
    file = ("picture.png", png(PICTURE))
    with (
        server.client() as client,
        pytest.raises(openai.BadRequestError, match=r"2 of image\[\]\nSend one\."),
    ):
        client.images.edit(image=[file, file], prompt="a cat", extra_body=EXTRA)


def test_an_edit_is_no_json(server: Server) -> None:
    reply = server.ask("/v1/images/edits", {"prompt": "a cat", "image": text(PICTURE)})
    assert reply.status == 400
    assert "Send a form: multipart/form-data." in reply.json["error"]["message"]


def test_a_file_that_was_sent_as_text_is_told_from_one(server: Server) -> None:
    part = '--part\r\nContent-Disposition: form-data; name="image"\r\n\r\ncat.png\r\n--part--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=part"}
    reply = server.ask("/v1/images/edits", part.encode(), headers=headers)
    assert reply.status == 400
    assert "image: must be a file of the form, not text" in reply.json["error"]["message"]


@pytest.mark.parametrize("field", ["image", "prompt", "seed"])
def test_what_is_sent_twice_is_refused(server: Server, field: str) -> None:
    """A form may say anything twice; what counts would be the last."""
    values = {"image": png(PICTURE), "prompt": b"a cat", "seed": b"7"}
    parts = []
    for name in (*values, field):
        file = '; filename="a.png"' if name == "image" else ""
        head = f'--part\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts.append(head.encode() + values[name] + b"\r\n")
    headers = {"Content-Type": "multipart/form-data; boundary=part"}
    reply = server.ask("/v1/images/edits", b"".join([*parts, b"--part--\r\n"]), headers=headers)
    assert reply.status == 400
    assert f"{field} is there 2 times" in reply.json["error"]["message"]
