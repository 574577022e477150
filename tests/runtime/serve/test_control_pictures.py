"""Control pictures over HTTP, in both dialects: the pipeline's own pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from PIL import Image

from pictures import picture_of, png, text
from sd_engines.errors import ConfigError
from sd_runtime import Request
from sd_runtime.serve.a1111_controlnet import ControlUnit

from .conftest import running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import TinyModel

    from .conftest import Server

EXTRA = {"seed": 8, "num_inference_steps": 3, "guidance_scale": 3.0}
A1111 = {"prompt": "a cat", "seed": 8, "steps": 3, "cfg_scale": 3.0}
GRADIENT = Image.radial_gradient("L").resize((24, 24)).convert("RGB")
ONE, TWO = GRADIENT, GRADIENT.point(lambda value: 255 - value)
START = GRADIENT.point(lambda value: value // 2)


@pytest.fixture(scope="module")
def server(
    controlled_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """24×24 pictures, two ControlNets."""
    folder = tmp_path_factory.mktemp("control")
    with running(folder, controlled_model.bundle, "--threads", 1) as server:
        yield server
    assert "Traceback" not in server.log.read_text()


def assert_draws(model: TinyModel, b64: str | None, **options: Any) -> None:
    """It is the picture that the library draws, and the ControlNets did something."""
    drawn = np.asarray(picture_of(b64))
    expected = model.pipeline.generate(Request("a cat", **EXTRA, **options)).pixels[0]
    np.testing.assert_array_equal(drawn, expected)
    free = {name: options[name] for name in ("image", "strength") if name in options}
    assert (drawn != model.pipeline.generate(Request("a cat", **EXTRA, **free)).pixels[0]).any()


def test_a_generation_of_openais_client(controlled_model: TinyModel, server: Server) -> None:
    options = {
        "controlnet_conditioning_scale": [0.5, 1.3],
        "control_guidance_end": 0.7,
        "guess_mode": True,
    }
    with server.client() as client:
        (model,) = client.models.list().data
        assert model.controlnets == ["controlnet0", "controlnet1"]
        (image,) = client.images.generate(
            prompt="a cat",
            extra_body={**EXTRA, **options, "control_images": [text(ONE), text(TWO)]},
        ).data
    assert_draws(controlled_model, image.b64_json, control_image=[ONE, TWO], **options)


@pytest.mark.parametrize("as_files", [False, True])
def test_an_edit_of_openais_client(
    controlled_model: TinyModel, server: Server, as_files: bool
) -> None:
    options = {"controlnet_conditioning_scale": [0.5, 1.3], "strength": 0.8}
    start = ("start.png", png(START))
    with server.client() as client:
        if as_files:  # as a browser's form sends them
            answer: Any = client.post(
                "/images/edits",
                cast_to=object,
                body={"prompt": "a cat", **EXTRA, **options},
                files=[
                    ("image", start),
                    ("control_images", ("one.png", png(ONE))),
                    ("control_images", ("two.png", png(TWO))),
                ],
                options={"headers": {"Content-Type": "multipart/form-data"}},
            )
            b64 = answer["data"][0]["b64_json"]
        else:
            controls = {"control_images": [text(ONE), text(TWO)]}
            answer = client.images.edit(
                prompt="a cat", image=start, extra_body={**EXTRA, **options, **controls}
            )
            b64 = answer.data[0].b64_json
    assert_draws(controlled_model, b64, image=START, control_image=[ONE, TWO], **options)


def test_one_control_picture_of_an_edit_is_a_list_of_one(server: Server) -> None:
    """A form cannot tell one of several from one alone."""
    options = {"control_images": [text(ONE)], "control_guidance_end": [0.5]}
    with (
        server.client() as client,
        pytest.raises(openai.BadRequestError, match="1 control pictures for the 2 ControlNets"),
    ):
        client.images.edit(
            prompt="a cat", image=("start.png", png(START)), extra_body={**EXTRA, **options}
        )


def unit(picture: Image.Image | None, **options: Any) -> dict[str, Any]:
    """As the ``webuiapi`` package sends it."""
    return {
        "image": "" if picture is None else text(picture),
        "mask": None,
        "module": "none",
        "model": "None",
        "weight": 1.0,
        "resize_mode": "Resize and Fill",
        "low_vram": False,
        "processor_res": 512,
        "threshold_a": 64,
        "threshold_b": 64.5,
        "guidance_start": 0.0,
        "guidance_end": 1.0,
        "control_mode": "Balanced",
        "pixel_perfect": False,
        "hr_option": "Both",
        "enabled": True,
        **options,
    }


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (
            [
                unit(ONE, resize_mode=1, control_mode=0),
                unit(TWO, weight=0.5, guidance_end=0.7, resize_mode=2, control_mode=0),
            ],
            {"scale": [1, 0.5], "end": [1, 0.7]},
        ),
        ([unit(TWO, model="controlnet1 [0a1b2c3d]"), unit(ONE)], {}),
        ([unit(ONE), unit(TWO), unit(START, enabled=False, module="canny")], {}),
        (
            [unit(ONE, control_mode="ControlNet is more important"), unit(TWO, guessmode=True)],
            {"guess_mode": True},
        ),
        ([{"input_image": text(ONE), "guidance": 0.7}, {"image": text(TWO)}], {"end": [0.7, 1]}),
    ],
    ids=["numbers", "by name", "one is off", "guess mode", "older names"],
)
def test_units_of_the_web_uis_clients(
    controlled_model: TinyModel,
    server: Server,
    units: list[dict[str, Any]],
    expected: dict[str, Any],
) -> None:
    scripts = {"ControlNet": {"args": units}, "ADetailer": {"args": [False]}}
    reply = server.ask("/sdapi/v1/txt2img", {**A1111, "alwayson_scripts": scripts})
    assert reply.status == 200, reply.body
    assert "alwayson_scripts" not in reply.json["parameters"]
    assert_draws(
        controlled_model,
        reply.json["images"][0],
        control_image=[ONE, TWO],
        controlnet_conditioning_scale=expected.get("scale", 1.0),
        control_guidance_end=expected.get("end", 1.0),
        guess_mode=expected.get("guess_mode", False),
    )


def test_a_unit_may_have_every_field_that_the_extension_has() -> None:
    """At its own defaults; and Forge's, which are named otherwise."""
    own = {
        **unit(ONE),
        "is_ui": False,
        "input_mode": "simple",
        "batch_images": None,
        "output_dir": "",
        "loopback": False,
        "processor_res": -1,
        "threshold_a": -1,
        "threshold_b": -1,
        "inpaint_crop_input_image": True,
        "save_detected_map": True,
        "advanced_weighting": None,
        "effective_region_mask": None,
        "pulid_mode": "Fidelity",
        "union_control_type": "Unknown",
        "ipadapter_input": None,
    }
    forge = {"use_preview_as_input": False, "generated_image": None, "mask_image": None}
    older = {"lowvram": False, "rgbbgr_mode": False}
    fields = {**own, **forge, **older}
    assert ControlUnit.model_validate({**fields}) == ControlUnit.model_validate(
        unit(ONE, processor_res=-1, threshold_a=-1, threshold_b=-1)
    )
    for asked in ({"pulid_mode": "Extremely style"}, {"union_control_type": "Depth"}):
        with pytest.raises(ConfigError, match="which this server cannot do"):
            ControlUnit.model_validate({**fields, **asked})


@pytest.mark.parametrize(
    "mode",
    [
        *(None, 0, 1, 2, "Just Resize", "Crop and Resize", "Resize and Fill"),
        *("Inner Fit (Scale to Fit)", "Outer Fit (Shrink to Fit)"),
        *("Scale to Fit (Inner Fit)", "Envelope (Outer Fit)"),
    ],
)
def test_a_picture_of_the_right_proportions_fits_by_every_name(mode: int | str | None) -> None:
    asked = ControlUnit.model_validate(unit(ONE, resize_mode=mode))
    np.testing.assert_array_equal(asked.picture(image=None, size=(48, 48)), ONE)


def test_an_img2img_lends_its_picture_to_units_without(
    controlled_model: TinyModel, server: Server
) -> None:
    scripts = {"controlnet": {"args": [unit(None), unit(TWO)]}}
    body = {**A1111, "init_images": [text(START)], "denoising_strength": 0.8}
    reply = server.ask("/sdapi/v1/img2img", {**body, "alwayson_scripts": scripts})
    assert reply.status == 200, reply.body
    assert_draws(
        controlled_model,
        reply.json["images"][0],
        image=START,
        strength=0.8,
        control_image=[START, TWO],
    )


def test_what_clients_of_the_extension_ask_first(server: Server) -> None:
    names = ["controlnet0", "controlnet1"]
    assert server.ask("/controlnet/model_list?update=true").json == {"model_list": names}
    assert server.ask("/controlnet/module_list").json["module_list"] == ["none"]
    assert server.ask("/controlnet/settings").json == {"control_net_unit_count": 2}
    assert server.ask("/controlnet/version").json == {"version": 3}


WIDE = ONE.resize((48, 24))


@pytest.mark.parametrize(
    ("units", "words"),
    [
        ([unit(ONE)], "1 control pictures for the 2 ControlNets of bundle: controlnet0, control"),
        ([unit(ONE)] * 3, "3 control pictures for the 2"),
        ([unit(ONE, module="canny"), unit(TWO)], "module is 'canny', and this server has no pre"),
        ([unit(ONE, model="canny"), unit(TWO)], "no ControlNet 'canny' here Known: controlnet0"),
        ([unit(ONE, model="controlnet1"), unit(TWO, model="controlnet_1")], "two units for the"),
        ([unit(None), unit(TWO)], "unit without a picture"),
        ([unit(WIDE), unit(TWO)], "is 48×24 (width × height), of other proportions than 24×24"),
        ([unit(ONE, resize_mode="Fit"), unit(TWO)], "resize_mode is 'Fit'"),
        ([unit(ONE, control_mode="My prompt is more important"), unit(TWO)], "control_mode is 'My"),
        ([unit(ONE, control_mode=2), unit(TWO)], "units of different control_mode"),
        ([unit(ONE, mask=text(TWO)), unit(TWO)], "mask is"),
        ([unit(ONE, weight=11), unit(TWO)], "less than or equal to 10"),
        ([unit(ONE, guidance_start=0.9, guidance_end=0.5), unit(TWO)], "starts at 0.9 and ends"),
        ([unit(ONE, wieght=1), unit(TWO)], "Did you mean 'weight'"),
        ([{"image": "http://127.0.0.1/"}, unit(TWO)], "URLs are not read"),
    ],
)
def test_wrong_units_say_what_to_do(
    server: Server, units: list[dict[str, Any]], words: str
) -> None:
    body = {**A1111, "alwayson_scripts": {"controlnet": {"args": units}}}
    reply = server.ask("/sdapi/v1/txt2img", body)
    assert reply.status == 400, reply.body
    assert words in reply.json["detail"].replace("\n", " ")
    assert reply.json["errors"]


def test_a_picture_that_is_stretched_is_asked_for(
    controlled_model: TinyModel, server: Server
) -> None:
    scripts = {"controlnet": {"args": [unit(WIDE, resize_mode=0), unit(TWO)]}}
    reply = server.ask("/sdapi/v1/txt2img", {**A1111, "alwayson_scripts": scripts})
    assert_draws(controlled_model, reply.json["images"][0], control_image=[WIDE, TWO])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"control_images": [text(ONE)]}, "1 control pictures for the 2 ControlNets"),
        ({"control_images": []}, "0 control pictures"),
        ({"control_images": [text(ONE), "aGVsbG8="]}, "cannot be read"),
        ({"control_images": text(ONE)}, "control_images: Input should be a valid list"),
        ({"controlnet_conditioning_scale": 0.5}, "without a control picture"),
        (
            {"control_images": [text(ONE)] * 2, "control_guidance_start": [0.1, 0.2, 0.3]},
            "3 numbers for 2",
        ),
        ({"control_images": [text(ONE)] * 2, "control_guidance_end": 2}, "less than or equal to 1"),
    ],
)
def test_wrong_control_pictures_say_what_to_do(
    server: Server, options: dict[str, Any], words: str
) -> None:
    reply = server.ask("/v1/images/generations", {"prompt": "a cat", **EXTRA, **options})
    assert reply.status == 400, reply.body
    assert words in reply.json["error"]["message"]
