"""The same doors as an application of Ray Serve: two replicas, below a prefix, behind a key."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from sd_engines.errors import SdError
from sd_runtime import Request

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import RayCluster, TinyModel

DRIVER = """
import json, sys
import ray
from ray import serve
from sd_runtime.serve.ray import app
port, arguments = int(sys.argv[1]), json.loads(sys.argv[2])
ray.init(log_to_driver=False, logging_level="ERROR")
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(app(arguments), route_prefix="/tiny")
print("up", flush=True)
input()
serve.shutdown()
"""


def ask(url: str, body: object = None, *, key: str = "") -> tuple[int, bytes]:
    """The status and the body of an answer."""
    request = urllib.request.Request(  # noqa: S310 - our own server
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow  # as long as the one that kills a worker
def test_two_replicas_answer(
    tiny_model: TinyModel, guarded_model: TinyModel, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    second = shutil.copytree(guarded_model.bundle, tmp_path / "second.bundle")
    key = tmp_path / "key"
    key.write_text("secret")
    arguments = {
        "bundle": [str(tiny_model.bundle), str(second)],
        "backend": "onnxruntime",
        "api_key_file": str(key),
        "min_replicas": 2,
        "max_replicas": 2,
    }
    request = Request("a cat", seed=7, num_inference_steps=2)
    models = [("bundle", tiny_model), ("second", guarded_model)]
    expected = {name: model.pipeline.generate(request).pixels[0] for name, model in models}
    port, log = free_port(), tmp_path / "stderr.txt"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(port), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=ray_cluster.environment,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n", log.read_text()
        url = f"http://127.0.0.1:{port}/tiny"
        status, reply = ask(f"{url}/health/ready")
        assert status == 200, "it needs no key, below a prefix too"
        assert json.loads(reply)["ready"]
        assert ask(f"{url}/v1/models")[0] == 401
        body = {"prompt": "a cat", "seed": 7, "num_inference_steps": 2}
        for name in ("bundle", "second", "second", "bundle"):
            status, reply = ask(
                f"{url}/v1/images/generations", {**body, "model": name}, key="secret"
            )
            assert status == 200, reply
            picture = base64.b64decode(json.loads(reply)["data"][0]["b64_json"])
            with Image.open(io.BytesIO(picture)) as image:
                np.testing.assert_array_equal(np.asarray(image), expected[name])
        _, reply = ask(f"{url}/v1/images/generations", {**body, "stream": True}, key="secret")
        assert b"event: image_generation.completed" in reply
        status, reply = ask(f"{url}/sdapi/v1/txt2img", {"prompt": "a", "steps": 999}, key="secret")
        assert status == 400
        assert b"150 at most" in reply
        process.communicate("\n", timeout=60)
    assert process.returncode == 0


@pytest.mark.usefixtures("needs_ray")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "'bundle'"),
        ({"bundle": "BUNDLE", "replicas": 2}, "'replicas'"),
        ({"bundle": "BUNDLE", "min_replicas": 2}, "the greater as max_replicas"),
        ({"bundle": "missing"}, "there is no such folder"),
        ({"bundle": ["BUNDLE", "missing"]}, "there is no such folder"),
        ({"bundle": ["BUNDLE", "BUNDLE"]}, "two bundles are called bundle"),
        ({"bundle": []}, "at least 1 item"),
    ],
)
def test_bad_arguments(tiny_model: TinyModel, arguments: dict[str, object], words: str) -> None:
    from sd_runtime.serve.ray import app

    arguments = json.loads(json.dumps(arguments).replace("BUNDLE", str(tiny_model.bundle)))
    with pytest.raises(SdError) as caught:
        app(arguments)
    assert words in str(caught.value)
