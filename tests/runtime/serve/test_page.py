"""The page for people: whole in itself, and in step with the doors it uses."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

from sd_runtime.serve.openai_bodies import Edit, Generation

if TYPE_CHECKING:
    from .conftest import Server


class Elements(HTMLParser):
    """Every element's name and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_asks_nothing_of_other_servers(server: Server) -> None:
    reply = server.ask("/")
    html = reply.body.decode()
    assert reply.status == 200
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"https?://|//\w+\.|@import|url\(", html)
    assert len(re.findall(r"fetch\(", html)) == len(re.findall(r"fetch\(below\(", html)) == 3


def test_every_field_has_a_label(server: Server) -> None:
    elements = Elements(server.ask("/").body.decode()).found
    labelled = {attributes["for"] for tag, attributes in elements if tag == "label"}
    fields = {
        attributes["id"] for tag, attributes in elements if tag in ("input", "textarea", "select")
    }
    assert fields
    assert fields == labelled


def test_the_page_sends_and_reads_what_there_is(server: Server) -> None:
    html = server.ask("/").body.decode()
    sent = re.search(r"const body = \{(.*?)\n  \};", html, re.DOTALL)
    assert sent is not None
    names = set(re.findall(r"^    (\w+):", sent.group(1), re.MULTILINE))
    names |= set(re.findall(r"\bbody\.(\w+) =", html))
    assert {"prompt", "seed", "stream"} <= names
    starts = {"image", "mask", "strength"}
    assert starts <= names <= set(Edit.model_fields)
    assert names - starts <= set(Generation.model_fields)
    assert "negative_prompt:" not in sent.group(1)  # empty text is not left out to XL
    assert "negative_prompt" in names
    model = server.ask("/v1/models").json["data"][0]
    assert set(re.findall(r"\bmodel\.([a-z_]+)\b", html)) <= set(model)
    picture = server.ask("/v1/images/generations", {"prompt": "a cat", "num_inference_steps": 1})
    recipe = picture.json["data"][0]["recipe"]
    assert set(re.findall(r"\brecipe\.([a-z_]+)\b", html)) <= set(recipe)


def test_a_recipe_fills_in_every_field_that_a_drawing_reads(server: Server) -> None:
    html = server.ask("/").body.decode()

    def fields(function: str) -> set[str]:
        found = re.search(rf"^function {function}\(.*?^\}}", html, re.DOTALL | re.MULTILINE)
        assert found is not None
        return set(re.findall(r"\([\"`]([a-z]+)", found[0]))

    assert {"prompt", "image", "control"} <= fields("request") <= fields("useRecipe")
    assert "name" in fields("useRecipe")  # the model


def test_a_picture_of_the_gallery_is_shown_with_all_that_is_shown_of_a_new_one(
    server: Server,
) -> None:
    html = server.ask("/").body.decode()
    found = re.search(r"^function show\((\w+)\) \{(.*?)^\}", html, re.DOTALL | re.MULTILINE)
    assert found is not None
    read = set(re.findall(rf"\b{found[1]}\.(\w+)", found[2]))
    assert {"recipe", "size", "nsfw_content_detected"} <= read
    (given,) = re.findall(r"\bshow\(\{(.*?)\}\)", html, re.DOTALL)
    assert "...picture" in given or read <= set(re.findall(r"(\w+):", given))
