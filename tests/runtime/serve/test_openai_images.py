"""The door for OpenAI's clients, seen by their own Python client."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from PIL import Image

from pictures import picture_of
from sd_runtime import Request
from sd_runtime.recipe import Recipe, recipes_from_text
from sd_runtime.serve.a1111_bodies import TextToImage
from sd_runtime.serve.offer import Offer
from sd_runtime.serve.openai_bodies import Generation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import TinyModel

    from .conftest import Server

EXTRA = {"seed": 7, "num_inference_steps": 3, "scheduler": "euler_a", "guidance_scale": 3}
REQUEST = Request("a cat", **EXTRA)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def difference(picture: Image.Image, expected: np.ndarray) -> int:
    return int(np.abs(np.asarray(picture.convert("RGB")).astype(int) - expected).max())


def test_pictures_are_the_pipelines_own(tiny_model: TinyModel, client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a cat", n=3, size="64x64", response_format="b64_json", extra_body=EXTRA
    )
    alone = [
        tiny_model.pipeline.generate(Request("a cat", **EXTRA | {"seed": 7 + i})).pixels[0]
        for i in range(3)
    ]
    assert answer.size == "64x64"
    assert answer.output_format == "png"
    for image, expected in zip(answer.data, alone, strict=True):
        picture = picture_of(image.b64_json)
        assert difference(picture, expected) <= 1
        (recipe,), _ = recipes_from_text(picture.info["sd-toolkit"])
        assert recipe == Recipe.from_json(image.recipe)
        assert recipe.seed == image.seed


@pytest.fixture
def offer(tiny_model: TinyModel) -> Offer:
    return Offer.from_pipeline(tiny_model.pipeline, max_images=4, max_steps=10)


def test_everything_that_is_asked_reaches_the_pipeline(offer: Offer) -> None:
    asked = {
        **{"negative_prompt": "red", "seed": 3, "scheduler": "ddim", "eta": 0.5},
        **{"num_inference_steps": 5, "guidance_scale": 2.5, "prompt_weighting": True},
        **{"guidance_start": 0.2, "guidance_stop": 0.8, "cache_interval": 2},
    }
    body = {"prompt": "a cat", "n": 2, "size": "24x16", **asked}
    request = Generation.model_validate(body).request(offer)
    assert request == Request("a cat", width=24, height=16, num_images_per_prompt=2, **asked)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("background", ("auto", "opaque")),
        ("moderation", ("auto", "low")),
        ("quality", ("auto", "standard")),
        ("size", ("auto",)),
        ("user", ("somebody",)),
    ],
)
def test_words_of_openais_that_change_nothing_pass(
    offer: Offer, name: str, values: tuple[str, ...]
) -> None:
    plain = Generation.model_validate({"prompt": "a cat"}).request(offer)
    for value in values:
        body = Generation.model_validate({"prompt": "a cat", name: value})
        assert body.request(offer) == plain


def test_no_more_steps_than_the_server_allows_where_none_are_asked(offer: Offer) -> None:
    """The bundle's own would be 50."""
    for kind in (Generation, TextToImage):
        request = kind.model_validate({"prompt": "a cat"}).request(offer)
        assert (request.num_inference_steps, request.num_images) == (10, 1)


@pytest.mark.parametrize("format_", ["jpeg", "webp"])
def test_other_formats(tiny_model: TinyModel, client: openai.OpenAI, format_: str) -> None:
    (image,) = client.images.generate(prompt="a cat", output_format=format_, extra_body=EXTRA).data
    picture = picture_of(image.b64_json)
    assert picture.format == format_.upper()
    own = tiny_model.pipeline.generate(REQUEST).encode(0, format_.upper())
    assert difference(picture, np.asarray(Image.open(io.BytesIO(own)))) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_has_no_room_in_its_file_is_not_drawn(server: Server, stream: bool) -> None:
    drawn = server.metric("sd_serve_pictures_total")
    foxes = "\N{FOX FACE}" * 4000  # 12 bytes each in a recipe
    body = {"prompt": foxes, "num_inference_steps": 1, "stream": stream}
    for format_ in ("jpeg", "webp", "png"):
        reply = server.ask("/v1/images/generations", {**body, "output_format": format_})
        assert reply.status == 200, reply.body
    body["negative_prompt"] = foxes
    reply = server.ask("/v1/images/generations", {**body, "output_format": "jpeg"})
    assert reply.status == 400
    assert "its recipe is" in reply.json["error"]["message"]
    assert "Write a .png instead" in reply.json["error"]["hint"]
    assert server.metric("sd_serve_pictures_total") == drawn + 3


def test_a_stream_shows_the_picture_on_its_way(client: openai.OpenAI, server: Server) -> None:
    (alone,) = client.images.generate(prompt="a cat", extra_body=EXTRA).data
    options = {**EXTRA, "num_inference_steps": 3}
    events = list(
        client.images.generate(prompt="a cat", stream=True, partial_images=2, extra_body=options)
    )
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert [picture_of(event.b64_json).size for event in events] == [(64, 64)] * 3
    assert events[-1].b64_json == alone.b64_json
    # Comments, which clients skip, tell of every step.
    body = {"prompt": "a cat", "stream": True, **EXTRA}
    lines = server.ask("/v1/images/generations", body).body.decode().splitlines()
    comments = [json.loads(line[1:]) for line in lines if line.startswith(":")]
    assert comments[1:] == [{"step": step, "num_steps": 3} for step in (1, 2, 3)]


@pytest.mark.parametrize("partial_images", [0, 1])
def test_a_stream_tells_of_a_bug_as_an_answer_does(
    tiny_model: TinyModel, start: Callable[..., Any], partial_images: int
) -> None:
    bug = "from PIL import Image; Image.Image.save = None; "
    body = {"prompt": "a cat", "stream": True, "partial_images": partial_images, **EXTRA}
    headers = {"X-Request-Id": "order-66"}
    with start(tiny_model.bundle, "--log-format", "json", before=bug) as server:
        reply = server.ask("/v1/images/generations", body, headers=headers)
        server.log_line("order-66")
    events = [event for event in reply.body.decode().split("\n\n") if event[:1] != ":"]
    assert events.pop() == ""
    kind, data = events.pop().split("\n")
    assert kind == "event: error"
    error = json.loads(data.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "NoneType" not in reply.body.decode()
    assert events == []
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    (line,) = [line for line in lines if line["level"] == "error"]
    assert line["request_id"] == "order-66"
    assert "'NoneType' object is not callable" in line["traceback"]


def test_a_stream_of_several_pictures_says_which_is_which(client: openai.OpenAI) -> None:
    events = list(
        client.images.generate(prompt="a cat", n=3, stream=True, partial_images=1, extra_body=EXTRA)
    )
    partial = [event for event in events if event.type.endswith("partial_image")]
    completed = [event for event in events if event.type.endswith("completed")]
    assert [event.image_index for event in completed] == [0, 1, 2]
    assert {event.image_index for event in partial} <= {0, 1, 2}
    assert [event.seed for event in completed] == [7, 8, 9]


def test_the_answer_says_what_the_drawing_took(server: Server) -> None:
    reply = server.ask("/v1/images/generations", {"prompt": "a cat", **EXTRA})
    stages = dict(part.split(";dur=") for part in reply.headers["server-timing"].split(", "))
    assert {"unet", "vae_decoder", "total", "png"} <= set(stages)
    assert float(stages["total"]) > float(stages["unet"]) > 0


def test_the_model_is_listed_with_what_it_can_do(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    assert (model.height, model.width, model.max_steps) == (64, 64, 40)
    assert "dpm++_2m_karras" in model.schedulers
    client.images.generate(prompt="a cat", model=model.id, extra_body=EXTRA)
    with pytest.raises(openai.NotFoundError, match="served: bundle"):
        client.images.generate(prompt="a cat", model="dall-e-3", extra_body=EXTRA)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": "a cat", "num_inference_step": 3}, "Did you mean 'num_inference_steps'"),
        ({"prompt": "a cat", "scheduler": "eulr"}, "Did you mean 'euler'"),
        ({"prompt": "a cat", "size": "512x768"}, "draws 64×64"),
        ({"prompt": "a cat", "size": "64"}, "size: String should match pattern"),
        ({"prompt": "a cat", "size": "64x64x3"}, "size: String should match pattern"),
        ({"prompt": "a cat", "n": 41}, "Ask for 40 at most"),
        ({"prompt": "a cat", "n": True}, "n: Input should be a valid integer"),
        ({"prompt": "a cat", "num_inference_steps": 41}, "Ask for 40 at most"),
        ({"prompt": "a" * 4001}, "at most 4000 characters"),
        ({"prompt": "a cat", "response_format": "url"}, "Input should be 'b64_json'"),
        ({"prompt": "a cat", "background": "transparent"}, "background is 'transparent'"),
        ({"prompt": "a cat", "cache_interval": 2}, "no shallow UNet"),
        ({"prompt": "a cat", "image": "/etc/hostname"}, "unknown field 'image'"),
        ({"prompt": "a cat", "partial_images": 2}, "Set stream to true"),
        ({"prompt": "a cat", "guidance_scale": 1e9}, "less than or equal to 100"),
        ({"prompt": "a cat", "guidance_scale": -1}, "greater than or equal to 0"),
        ({"prompt": "a cat", "seed": 2**64}, "seed: "),
        ({"prompt": "a cat", "n": 2, "seed": 2**64 - 1}, "seed of the last picture"),
        ({"prompt": "\ud800"}, "prompt: "),
        ([], "valid dictionary"),
        (b"{", "the body is no JSON: Expecting property name enclosed in double quotes, at 1"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", ""),
        (b"[" * 100_000, ""),
    ],
)
def test_a_wrong_request_says_what_to_do(server: Server, body: object, words: str) -> None:
    reply = server.ask("/v1/images/generations", body)
    assert reply.status == 400
    error = reply.json["error"]
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert error["hint"]
    assert error["hint"] in error["message"]


def test_only_json_is_read(server: Server) -> None:
    """A form of another site's page could send plain text without asking first."""
    body = b'{"prompt": "a cat"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # curl's, unless told
        reply = server.ask("/v1/images/generations", body, headers={"Content-Type": kind})
        assert reply.status == 400
        assert (
            f"sent as {kind}\nSend JSON, as Content-Type: application/json."
            in (reply.json["error"]["message"])
        )
    assert server.ask("/nowhere").status == 404
    assert server.ask("/v1/images/generations").status == 405
