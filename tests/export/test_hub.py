"""Checkpoints from the Hub, served by a stand-in of its HTTP API on this machine.

The client is the real huggingface_hub, in a process of its own, because it reads its environment
once; the stand-in answers what that client asks.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
REPOSITORY = "someone/tiny-diffusion"
FIND = """
import json, sys
from sd_export.source import find_checkpoint
found = find_checkpoint(sys.argv[1], **json.loads(sys.argv[2]))
print(json.dumps({
    "revision": found.revision,
    "source": found.source,
    "license": found.license,
    "weights": {k: [str(p) for p in v] for k, v in found.weights.items()},
    "tokenizer": str(found.tokenizers["text_encoder"]),
}))
"""
FIND_CONTROLNET = """
import json, sys
from sd_export.controlnet import find_controlnet
found = find_controlnet(sys.argv[1])
print(json.dumps({"source": found.source, "weights": list(map(str, found.weights))}))
"""

FIND_VAE = """
import json, sys
from sd_export.source import find_checkpoint
from sd_export.vae import with_vae
own = find_checkpoint(json.loads(sys.argv[2])["checkpoint"])
vae = with_vae(own, sys.argv[1]).vae
print(json.dumps({"revision": vae.revision, "weights": [str(p) for p in vae.weights]}))
"""

QUIET = """
import sys
from sd_export.cli import main
sys.exit(main(["--model", sys.argv[1], "--output", "never-made", "--variant", "int4", "--quiet"]))
"""


class Hub:
    """The stand-in: one repository at two commits, one that is gated, one that is broken."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.commits = {COMMIT: files, OLD_COMMIT: {"README.md": b"old"} | files}
        self.refs = {"main": COMMIT, "v1": OLD_COMMIT}
        self.asked: list[str] = []
        self.held: threading.Event | None = None
        self.is_holding = threading.Event()
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.tokens.add(request.headers.get("Authorization"))
        status, headers, data = self._respond(path)
        if body and status == 200 and "/resolve/" in path:
            self.asked.append(path.split("/resolve/")[1].split("/", 1)[1])
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            request.send_header(name, value)
        request.end_headers()
        if body and self.held is not None and path.endswith(".safetensors"):
            self.is_holding.set()
            self.held.wait()
        if body:
            with suppress(ConnectionError):  # who asked may be gone by then
                request.wfile.write(data)

    def _respond(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if "gated/" in path:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"}, b"{}"
        if "private/" in path:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if "broken/" in path:
            return 500, {}, b"{}"
        if REPOSITORY not in path:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        rest = path.split(REPOSITORY, 1)[1].strip("/")
        kind, _, rest = rest.partition("/")
        revision, _, name = rest.partition("/")
        commit = self.refs.get(revision or "main", revision)
        files = self.commits.get(commit)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if kind in ("", "revision"):
            siblings = [{"rfilename": file} for file in files]
            return _json({"id": REPOSITORY, "sha": commit, "siblings": siblings, "tags": []})
        if kind == "tree":
            return _json([_tree_entry(file, data) for file, data in files.items()])
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return (
            200,
            {
                "ETag": f'"{_etag(files[name])}"',
                "X-Repo-Commit": commit,
                "Accept-Ranges": "bytes",
                "Content-Type": "application/octet-stream",
            },
            files[name],
        )


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()  # noqa: S324


def _tree_entry(file: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": file, "size": len(data), "oid": _etag(data)}


@pytest.fixture(scope="module")
def files(checkpoint: Path) -> dict[str, bytes]:
    """The checkpoint's files, and others beside them as the Hub's repositories have."""
    found = {
        path.relative_to(checkpoint).as_posix(): path.read_bytes()
        for path in checkpoint.rglob("*")
        if path.is_file()
    }
    unet = found["unet/diffusion_pytorch_model.safetensors"]
    return found | {
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "unet/diffusion_pytorch_model.fp16.safetensors": unet,
        "unet/diffusion_pytorch_model.non_ema.safetensors": unet,
        "text_encoder/pytorch_model.bin": b"pickle",
        "text_encoder/model.fp16.safetensors": found["text_encoder/model.safetensors"],
        "vae/diffusion_pytorch_model.fp16.safetensors": found[
            "vae/diffusion_pytorch_model.safetensors"
        ],
        "safety_checker/model.fp16.safetensors": found["safety_checker/model.safetensors"],
        "v1-4-pruned.ckpt": b"four gigabytes",
        "v1-4-pruned.safetensors": b"four gigabytes",
        "LICENSE": b"CreativeML Open RAIL-M, its whole text",
        "low_res_scheduler/scheduler_config.json": b"{}",  # as an upscaler's has
    }


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)
    yield hub
    hub.close()


def find(
    hub: Hub,
    home: Path,
    model: str = REPOSITORY,
    *,
    offline: bool = False,
    script: str = FIND,
    **options: str,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, model, json.dumps(options)],
        capture_output=True,
        text=True,
        env=environment(hub, home, offline=offline),
        timeout=120,
    )


def environment(hub: Hub, home: Path, *, offline: bool = False) -> dict[str, str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    variables |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_tiny",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if offline:
        variables["HF_HUB_OFFLINE"] = "1"
    return variables


def found(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_only_what_is_needed_is_fetched_and_the_commit_is_known(hub: Hub, tmp_path: Path) -> None:
    result = found(find(hub, tmp_path))
    assert result["revision"] == COMMIT
    assert result["source"] == REPOSITORY
    assert result["license"] == "creativeml-openrail-m"
    fetched = set(hub.asked)
    weights = {name for name in fetched if name.endswith((".safetensors", ".bin", ".ckpt"))}
    assert weights == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "safety_checker/model.safetensors",
    }
    assert {"LICENSE", "README.md", "model_index.json", "tokenizer/merges.txt"} <= fetched
    assert "low_res_scheduler/scheduler_config.json" in fetched
    assert "Bearer hf_tiny" in hub.tokens
    (unet,) = result["weights"]["unet"]
    assert Path(unet).resolve().is_relative_to(tmp_path)  # HF_HOME
    count = len(hub.asked)
    found(find(hub, tmp_path))
    assert len(hub.asked) == count  # the cache answers


def test_revision_and_variant(hub: Hub, tmp_path: Path) -> None:
    result = found(find(hub, tmp_path, revision="v1", variant="fp16"))
    assert result["revision"] == OLD_COMMIT
    assert {name for name in hub.asked if name.endswith(".safetensors")} == {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.fp16.safetensors",
    }
    assert found(find(hub, tmp_path, revision=COMMIT))["revision"] == COMMIT


@pytest.mark.parametrize("name", ["{stem}.fp16-{number}", "{stem}-{number}.fp16"])
def test_shards_are_fetched_of_the_variant_alone(hub: Hub, tmp_path: Path, name: str) -> None:
    stem = "unet/diffusion_pytorch_model"
    plain, half = (
        [form.format(stem=stem, number=f"0000{n}-of-00002") + ".safetensors" for n in (1, 2)]
        for form in ("{stem}-{number}", name)
    )
    middle = "index.fp16" if name.startswith("{stem}.") else "fp16.index"
    files = {n: data for n, data in hub.commits[COMMIT].items() if not n.startswith(stem)}
    for names, index in ((plain, "index"), (half, middle)):
        shards = {f"weight {n}": Path(file).name for n, file in enumerate(names)}
        files[f"{stem}.safetensors.{index}.json"] = json.dumps({"weight_map": shards}).encode()
        files |= {file: file.encode() for file in names}
    hub.commits[COMMIT] = files
    for options, wanted in (({}, plain), ({"variant": "fp16"}, half)):
        hub.asked.clear()
        unet = found(find(hub, tmp_path, **options))["weights"]["unet"]
        assert [Path(path).read_text() for path in unet] == wanted
        assert sorted(file for file in hub.asked if "-of-" in file) == wanted


def test_a_model_with_half_precision_alone_is_told_before_it_is_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    whole = {name.replace(".fp16", "") for name in hub.commits[COMMIT] if ".fp16." in name}
    hub.commits[COMMIT] = {n: d for n, d in hub.commits[COMMIT].items() if n not in whole}
    refused = find(hub, tmp_path)
    assert "Try --variant fp16." in refused.stderr
    assert not [name for name in hub.asked if name.endswith((".safetensors", ".bin"))]


@pytest.mark.parametrize("alone", [False, True])
def test_of_a_repository_with_a_vae_the_vae_is_fetched(
    files: dict[str, bytes], checkpoint: Path, tmp_path: Path, alone: bool
) -> None:
    if alone:
        files = {n.removeprefix("vae/"): d for n, d in files.items() if n.startswith("vae/")}
    hub = Hub(files)
    try:
        result = found(find(hub, tmp_path, script=FIND_VAE, checkpoint=str(checkpoint)))
    finally:
        hub.close()
    assert result["revision"] == COMMIT
    weights = "diffusion_pytorch_model.safetensors"
    fetched = {name for name in hub.asked if name.endswith((".safetensors", ".bin"))}
    assert fetched == {weights if alone else f"vae/{weights}"}
    (path,) = result["weights"]
    assert path.endswith(weights)


def test_offline_takes_what_is_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    refused = find(hub, tmp_path, offline=True)
    assert "HF_HUB_OFFLINE is set" in refused.stderr
    online = found(find(hub, tmp_path))
    asked = len(hub.asked)
    assert found(find(hub, tmp_path, offline=True)) == online
    assert len(hub.asked) == asked
    refused = find(hub, tmp_path, offline=True, variant="fp16")
    assert "not in the cache" in refused.stderr or "no weights" in refused.stderr


def test_of_a_controlnet_its_own_files_are_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.commits[COMMIT] = {
        "config.json": b'{"_class_name": "ControlNetModel"}',
        "diffusion_pytorch_model.safetensors": b"weights",
        "diffusion_pytorch_model.bin": b"pickle",
        "diffusion_pytorch_model.fp16.safetensors": b"half the weights",
        "images/bird.png": b"a picture",
    }
    result = found(find(hub, tmp_path, script=FIND_CONTROLNET))
    assert result["source"] == f"{REPOSITORY}@{COMMIT}"
    (weights,) = map(Path, result["weights"])
    assert weights.read_bytes() == b"weights"
    assert set(hub.asked) == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_cache_without_the_list_of_files_serves_offline(hub: Hub, tmp_path: Path) -> None:
    """As earlier versions of huggingface_hub left it."""
    import shutil

    online = found(find(hub, tmp_path))
    for folder in tmp_path.rglob("trees"):
        shutil.rmtree(folder)
    assert found(find(hub, tmp_path, offline=True)) == online


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("someone/no-such-model", {}, "no such model on the Hub, or it is private"),
        ("private/model", {}, "no such model on the Hub, or it is private"),
        ("gated/model", {}, "its conditions are accepted"),
        ("broken/model", {}, "the Hub answered 500"),
        (REPOSITORY, {"revision": "v9"}, "no revision 'v9'"),
        (REPOSITORY, {"variant": "int4"}, "no weights for variant 'int4'"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(
    hub: Hub, tmp_path: Path, model: str, options: dict[str, str], words: str
) -> None:
    result = find(hub, tmp_path, model, **options)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()
    assert any(line.startswith("sd_engines.errors.ExportError: ") for line in last), result.stderr
    assert words in result.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_index.json": b'{"_class_name": "StableDiffusion3Pipeline"}'}, "Diffusion 3"),
        ({"model_index.json": None, "config.json": b'{"_class_name": "ControlNetModel"}'}, "a Con"),
    ],
)
def test_what_cannot_be_exported_is_not_downloaded(
    files: dict[str, bytes], tmp_path: Path, changes: dict[str, bytes | None], words: str
) -> None:
    changed = {name: data for name, data in {**files, **changes}.items() if data is not None}
    hub = Hub(changed)
    try:
        result = find(hub, tmp_path)
    finally:
        hub.close()
    assert words in result.stderr
    assert not [name for name in hub.asked if name.endswith(".safetensors")]


def test_an_interrupt_ends_a_download_that_has_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.held = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-c", QUIET.replace('"--variant", "int4", ', ""), REPOSITORY],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(hub, tmp_path / "home"),
    )
    try:
        assert hub.is_holding.wait(120)
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
    finally:
        hub.held.set()
        process.kill()
    assert process.returncode == 130, words
    assert words.strip() == "Interrupted; the same command goes on where it stopped."
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_quiet_means_no_bars_of_downloads(hub: Hub, tmp_path: Path) -> None:
    result = find(hub, tmp_path, script=QUIET)
    assert result.stderr.splitlines()[1:] == ["Leave --variant out."]
    assert hub.asked


def test_no_network_is_told_apart(hub: Hub, tmp_path: Path) -> None:
    hub.close()
    result = find(hub, tmp_path)
    assert "cannot be reached" in result.stderr
