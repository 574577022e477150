"""Several bundles in one server: requests choose one by its name, in every dialect."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest

from pictures import picture_of
from sd_runtime import Request
from sd_runtime.serve.cli import main

from .conftest import running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import TinyModel

    from .conftest import Server

EXTRA = {"seed": 4, "num_inference_steps": 2, "guidance_scale": 3.0}
A1111 = {"prompt": "a cat", "seed": 4, "steps": 2, "cfg_scale": 3.0}


@pytest.fixture(scope="module")
def server(
    tiny_model: TinyModel, controlled_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """ "plain" draws 64×64, "lines" 24×24 and has two ControlNets."""
    folder = tmp_path_factory.mktemp("models")
    plain = shutil.copytree(tiny_model.bundle, folder / "plain.bundle")
    lines = shutil.copytree(controlled_model.bundle, folder / "lines")
    with running(folder, plain, lines, "--threads", 1) as server:
        yield server
    assert "Traceback" not in server.log.read_text()


@pytest.fixture
def models(tiny_model: TinyModel, controlled_model: TinyModel) -> dict[str | None, TinyModel]:
    return {None: tiny_model, "plain": tiny_model, "lines": controlled_model}


def assert_drawn_by(model: TinyModel, b64: str | None) -> None:
    drawn = np.asarray(picture_of(b64))
    np.testing.assert_array_equal(
        drawn, model.pipeline.generate(Request("a cat", **EXTRA)).pixels[0]
    )


def test_openais_client_chooses_by_model(
    server: Server, models: dict[str | None, TinyModel]
) -> None:
    with server.client() as client:
        listed = client.models.list().data
        assert [(model.id, model.width) for model in listed] == [("plain", 64), ("lines", 24)]
        assert client.models.retrieve("lines") == listed[1]
        for name in ("lines", None, "plain"):
            chosen: dict[str, Any] = {} if name is None else {"model": name}
            answer = client.images.generate(prompt="a cat", extra_body=EXTRA, **chosen)
            assert_drawn_by(models[name], answer.data[0].b64_json)
            assert answer.size == ("24x24" if name == "lines" else "64x64")
        events = list(
            client.images.generate(prompt="a cat", model="lines", stream=True, extra_body=EXTRA)
        )
        assert_drawn_by(models["lines"], events[-1].b64_json)
        for ask in (
            lambda: client.images.generate(prompt="a cat", model="dall-e-3"),
            lambda: client.models.retrieve("dall-e-3"),
        ):
            with pytest.raises(openai.NotFoundError, match="served: plain, lines") as caught:
                ask()
            assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="plain has no ControlNet"):
            client.images.generate(prompt="a cat", extra_body={"control_images": ["", ""]})


def test_metrics_tell_bundles_apart(server: Server) -> None:
    def pictures() -> list[float]:
        names = ("plain", "lines")
        return [server.metric("sd_serve_pictures_total", model=name) for name in names]

    plain, lines = pictures()
    runs = server.metric("sd_serve_stage_seconds_count", model="lines", stage="unet")
    body = {"prompt": "a cat", "model": "lines", **EXTRA}
    assert server.ask("/v1/images/generations", body).status == 200
    assert pictures() == [plain, lines + 1]
    assert server.metric("sd_serve_stage_seconds_count", model="lines", stage="unet") == runs + 2


def test_the_web_uis_clients_choose_by_settings(
    server: Server, models: dict[str | None, TinyModel]
) -> None:
    def drawn_by(name: str, **options: Any) -> None:
        reply = server.ask("/sdapi/v1/txt2img", {**A1111, **options})
        assert reply.status == 200, reply.body
        assert_drawn_by(models[name], reply.json["images"][0])

    def current() -> str:
        return str(server.ask("/sdapi/v1/options").json["sd_model_checkpoint"])

    titles = [model["title"] for model in server.ask("/sdapi/v1/sd-models").json]
    assert titles == ["plain", "lines"]
    drawn_by("plain")
    lines = {"override_settings": {"sd_model_checkpoint": "lines [0123456789]", "sd_vae": None}}
    drawn_by("lines", **lines)
    drawn_by("lines", **lines, override_settings_restore_afterwards=True)
    assert current() == "plain"
    drawn_by("lines", **lines, override_settings_restore_afterwards=False)
    assert current() == "lines"
    assert len(server.ask("/controlnet/model_list").json["model_list"]) == 2
    drawn_by("lines")
    drawn_by("plain", override_settings={"sd_model_checkpoint": "plain"})

    # As Open WebUI changes it: everything that it was told, and another checkpoint.
    options = server.ask("/sdapi/v1/options").json | {"sd_model_checkpoint": "plain"}
    changed = server.ask("/sdapi/v1/options", options)
    assert (changed.status, changed.json) == (200, None)
    drawn_by("plain")
    wrong = {"sd_model_checkpoint": "sd_xl"}
    for path, body in (
        ("/sdapi/v1/options", wrong),
        ("/sdapi/v1/txt2img", {**A1111, "override_settings": wrong}),
    ):
        reply = server.ask(path, body)
        assert (reply.status, reply.json["error"]) == (404, "model_not_found")
        assert "served: plain, lines" in reply.json["detail"]
    reply = server.ask("/sdapi/v1/options", {"CLIP_stop_at_last_layers": 2})
    assert "CLIP_stop_at_last_layers is 2" in reply.json["detail"]
    assert current() == "plain"


def test_all_bundles_are_checked_before_one_is_opened(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(tiny_model.bundle)
    namesake = shutil.copytree(bundle, tmp_path / "bundle")
    assert main([bundle, str(namesake), "--port", "0"]) == 2
    err = capsys.readouterr().err
    assert f"two bundles are called bundle: {bundle} and {namesake}" in err
    assert main([bundle, str(tmp_path / "none"), "--port", "0"]) == 3
    assert main([bundle, "--lora", str(tmp_path / "none"), "--port", "0"]) == 2
    assert "no such file" in capsys.readouterr().err
