"""Opening a bundle: what is missing, altered or linked elsewhere is found and named."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sd_engines import open_bundle
from sd_engines.build_command import build_command, missing_engine_hint
from sd_engines.bundle import EngineEntry, engine_key, hash_files
from sd_engines.errors import BundleError, EngineMismatchError
from sd_engines.files import unreadable
from sd_engines.spec import TensorSpec
from tiny_onnx import PROFILE, make_bundle, needs, stale_plan

if TYPE_CHECKING:
    from sd_engines import Bundle
    from sd_engines.spec import Precision

LISTED = ["unet/model.onnx", "unet/model.onnx_data", "tokenizer/tokenizer.json"]


def test_open_and_verify(tiny_bundle: Bundle) -> None:
    tiny_bundle.verify()
    assert tiny_bundle.verified_path("unet") == tiny_bundle.path / "unet/model.onnx"
    tokenizer = tiny_bundle.verified_path("tokenizer/tokenizer.json")
    assert tokenizer.read_text() == "{}"
    assert open_bundle(str(tiny_bundle.path)) == tiny_bundle


def test_opened_through_a_link_to_the_folder(tiny_bundle: Bundle, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tiny_bundle.path)
    open_bundle(link).verify()


@pytest.mark.parametrize("name", LISTED)
def test_one_changed_bit(tiny_bundle: Bundle, name: str) -> None:
    path = tiny_bundle.path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    opened = open_bundle(tiny_bundle.path)  # sizes agree; only the hash knows
    with pytest.raises(BundleError, match=f"{name}: altered") as caught:
        opened.verify()
    assert "sd-export" in caught.value.hint
    assert caught.value.exit_code == 3
    with pytest.raises(BundleError, match="altered"):
        opened.verified_path("unet" if name.startswith("unet") else name)


@pytest.mark.parametrize("name", LISTED)
def test_truncated(tiny_bundle: Bundle, name: str) -> None:
    path = tiny_bundle.path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"{name}: has \d+ bytes, not \d+"):
        open_bundle(tiny_bundle.path)
    with pytest.raises(BundleError, match="bytes, not"):
        tiny_bundle.verify()


@pytest.mark.parametrize("name", LISTED)
def test_missing(tiny_bundle: Bundle, name: str) -> None:
    (tiny_bundle.path / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: is missing"):
        open_bundle(tiny_bundle.path)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no such folder") as caught:
        open_bundle(tmp_path / "none")
    assert "Check the path" in caught.value.hint
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        open_bundle(tmp_path)
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/bundle"):
        with pytest.raises(BundleError, match=r"is a file|there is no such folder"):
            open_bundle(tmp_path / name)


def test_checkpoint_in_place_of_a_bundle(tmp_path: Path) -> None:
    checkpoint = tmp_path / "my model"
    checkpoint.mkdir()
    (checkpoint / "model_index.json").write_text("{}")
    with pytest.raises(BundleError, match="is a checkpoint, not a bundle") as caught:
        open_bundle(checkpoint)
    assert f"--model '{checkpoint}'" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "hint"), [(PermissionError(13, "no"), "chmod"), (OSError(5, "no"), "Copy it again")]
)
def test_hint_for_a_file_that_cannot_be_read(error: OSError, hint: str, tmp_path: Path) -> None:
    assert hint in unreadable(tmp_path, error).hint


def test_file_behind_a_link(tiny_bundle: Bundle, tmp_path: Path) -> None:
    name = "tokenizer/tokenizer.json"
    secret = tmp_path / "secret"
    secret.write_text("{}")  # the very bytes that the manifest lists
    (tiny_bundle.path / name).unlink()
    (tiny_bundle.path / name).symlink_to(secret)
    with pytest.raises(BundleError, match="is a link, or lies behind one"):
        open_bundle(tiny_bundle.path)


def test_folder_behind_a_link(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tiny_bundle.path / "tokenizer").rename(tmp_path / "elsewhere")
    (tiny_bundle.path / "tokenizer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link, or lies behind one"):
        open_bundle(tiny_bundle.path)


def test_manifest_behind_a_link(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tiny_bundle.path / "bundle.json").rename(tmp_path / "bundle.json")
    (tiny_bundle.path / "bundle.json").symlink_to(tmp_path / "bundle.json")
    with pytest.raises(BundleError):
        open_bundle(tiny_bundle.path)


def test_file_that_is_a_folder(tiny_bundle: Bundle) -> None:
    (tiny_bundle.path / "tokenizer/tokenizer.json").unlink()
    (tiny_bundle.path / "tokenizer/tokenizer.json").mkdir()
    with pytest.raises(BundleError, match="is missing"):
        open_bundle(tiny_bundle.path)


def test_unknown_name(tiny_bundle: Bundle) -> None:
    for name in ("vae", "bundle.json", "../x", "unet/model.onnx_data"):
        with pytest.raises(BundleError, match="has no"):
            tiny_bundle.verified_path(name)


def test_hash_files_is_sha256(tmp_path: Path) -> None:
    data = {"empty": b"", "small": b"abc", "large": bytes(range(256)) * (3 << 12)}  # 3 MiB
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
    found = hash_files(tmp_path, data)
    assert list(found) == list(data)
    for name, content in data.items():
        assert found[name].sha256 == hashlib.sha256(content).hexdigest()
        assert found[name].bytes == len(content)
    with pytest.raises(BundleError, match="none"):
        hash_files(tmp_path, ["none"])


def test_key_depends_on_everything() -> None:
    def key(onnx: tuple[str, ...] = ("a", "b"), **changed: object) -> str:
        parts: dict[str, object] = {
            "batch_size": 2,
            "precision": "fp32",
            "backend": "tensorrt",
            "version": "11.4",
            "target": "sm89",
            "flags": {"tf32": "off"},
        }
        return engine_key(onnx, **(parts | changed))  # type: ignore[arg-type]

    assert key() == key(onnx=("b", "a"))
    others = [
        key(onnx=("a", "c")),
        key(batch_size=3),
        key(precision="fp16"),
        key(backend="tensorrt-rtx"),
        key(version="11.5"),
        key(target="sm90"),
        key(flags={"tf32": "on"}),
        key(flags={}),
    ]
    assert len({key(), *others}) == 1 + len(others)


def test_stale_engine(tmp_path: Path) -> None:
    """A plan built from other weights than those in the bundle is never loaded."""
    bundle = make_bundle(tmp_path / "bundle")
    file = "engines/tensorrt-11.4-sm89/unet.engine"
    (bundle.path / file).parent.mkdir(parents=True)
    (bundle.path / file).write_bytes(b"plan")
    built = hash_files(bundle.path, [file])[file]
    engine = EngineEntry(
        component="unet",
        backend="tensorrt",
        version="11.4",
        target="sm89",
        precision="fp32",
        file=file,
        sha256=built.sha256,
        bytes=built.bytes,
        flags={},
        key="0" * 64,
    )
    with pytest.raises(EngineMismatchError, match="built from another unet") as caught:
        bundle.verified_engine(engine)
    again = f"sd-export build {bundle.path} --backend tensorrt --precision fp32 --target sm89"
    assert caught.value.hint == again

    unet = bundle.manifest.components["unet"]
    key = engine_key(
        (entry.sha256 for entry in unet.files.values()),
        batch_size=PROFILE.batch_size,
        precision="fp32",
        backend="tensorrt",
        version="11.4",
        target="sm89",
        flags={},
    )
    fresh = replace(engine, key=key)
    assert bundle.verified_engine(fresh) == bundle.path / file
    (bundle.path / file).write_bytes(b"plam")
    with pytest.raises(BundleError, match="altered") as caught_altered:
        bundle.verified_engine(fresh)
    assert "sd-export build" in caught_altered.value.hint


@pytest.mark.parametrize(
    ("backend", "component", "precision", "target", "workspace", "options"),
    [
        ("tensorrt", "unet", "fp16", "sm89-nvidia-l4", "all", ""),
        ("tensorrt", "unet", "fp16", "sm89", "all", "--target sm89"),
        ("tensorrt", "unet", "fp16", "sm80+", "all", "--target sm80+"),
        ("tensorrt", "vae_decoder", "tf32", "sm89-nvidia-l4", "all", ""),
        (
            *("tensorrt", "unet", "bf16", "sm89-nvidia-l4", str(64 << 20)),
            "--precision bf16 --workspace-mib 64",
        ),
        ("tensorrt-rtx", "controlnet_0", "tf32", "any", "all", "--precision tf32"),
        ("tensorrt-rtx", "unet", "fp16", "sm86+sm120", "all", "--target sm86+sm120"),
        ("openvino", "unet", "int8", "cpu", None, "--precision int8"),
    ],
)
def test_the_command_that_makes_an_engine_anew(
    backend: str,
    component: str,
    precision: Precision,
    target: str,
    workspace: str | None,
    options: str,
) -> None:
    engine = replace(
        stale_plan(precision),
        backend=backend,
        component=component,
        target=target,
        flags={} if workspace is None else {"workspace_bytes": workspace},
    )
    command = f"sd-export build b --backend {backend} {options}".rstrip()
    assert build_command(Path("b"), engine) == command
    spaced = command.replace("build b", "build 'my b'")
    assert build_command(Path("my b"), engine) == spaced


@pytest.mark.parametrize(
    ("graph", "backend", "precision", "hint"),
    [
        ("fp32", "auto", None, "--backend onnxruntime"),
        ("fp32", "openvino", None, "--backend openvino"),
        ("fp32", "auto", "fp32", "--backend onnxruntime --precision fp32"),
        ("fp16", "auto", "fp32", "--backend openvino --precision fp32"),
        ("fp32", "auto", "fp16", "Export the checkpoint again with --precision fp16."),
        ("fp32", "openvino", "fp16", "Export the checkpoint again with --precision fp16."),
        ("fp16", "auto", "fp16", "--backend onnxruntime"),
        ("fp32", "tensorrt", "fp16", "--backend tensorrt --precision fp16"),
        ("fp32", "auto", "tf32", "--backend onnxruntime --target cuda"),
        ("fp16", "tensorrt", "tf32", "Export the checkpoint again with --precision tf32."),
        ("fp32", "onnxruntime", "bf16", "--backend openvino --precision bf16"),
        ("fp32", "tensorrt", "int8", "--backend openvino --precision int8"),
        (
            "fp16",
            "auto",
            "int8",
            "Export the checkpoint again with --backend openvino --precision int8.",
        ),
        ("fp16", "auto", "fp8", "--backend tensorrt --precision fp8"),
        ("fp32", "tensorrt-rtx", "fp8", "--backend tensorrt-rtx --precision fp8"),
        (
            "bf16",
            "onnxruntime",
            "fp8",
            "Export the checkpoint again with --backend tensorrt --precision fp8.",
        ),
    ],
)
def test_what_to_do_where_an_engine_is_missing(
    tiny_bundle: Bundle, graph: Precision, backend: str, precision: Precision | None, hint: str
) -> None:
    entry = replace(tiny_bundle.manifest.components["unet"], precision=graph)
    found = missing_engine_hint(Path("b"), entry, backend=backend, precision=precision)
    assert found.removeprefix("sd-export build b ") == hint


def test_no_int8_is_made_of_a_unet_that_caches_its_features(tiny_bundle: Bundle) -> None:
    unet = tiny_bundle.manifest.components["unet"]
    features = replace(unet.outputs[0], name="deep_features")
    cached = replace(unet, outputs=(*unet.outputs, features))
    hint = missing_engine_hint(Path("b"), cached, backend="auto", precision="int8")
    assert "sd-export build" not in hint
    assert "without --feature-cache" in hint


@pytest.mark.parametrize("graph", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("masked_image_latents", (4, 8, 8)),
        ("depth_mask", (1, 8, 8)),
        ("low_res_image", (3, 8, 8)),
        ("encoder_hidden_states", (1, 16)),
        ("time_ids", (5,)),
    ],
)
def test_no_int8_is_made_of_a_unet_that_takes_a_picture(
    tiny_bundle: Bundle, name: str, shape: tuple[int, ...], graph: Precision
) -> None:
    unet = tiny_bundle.manifest.components["unet"]
    picture = TensorSpec(name, "float32", ("batch", *shape))
    inputs = (*(spec for spec in unet.inputs if spec.name != name), picture)
    entry = replace(unet, inputs=inputs, precision=graph)
    hint = missing_engine_hint(Path("b"), entry, backend="auto", precision="int8")
    assert hint == "Take another --precision: int8 is for UNets that draw from text alone."


def test_int8_is_offered_for_a_unet_of_xl_with_controlnets(tiny_bundle: Bundle) -> None:
    unet = tiny_bundle.manifest.components["unet"]
    told = {"pooled_prompt_embeds": (8,), "time_ids": (6,), "timestep_cond": (8,)}
    told |= {f"down_block_additional_residual_{index}": (8, 8, 8) for index in range(2)}
    told |= {"mid_block_additional_residual": (8, 8, 8)}
    more = [TensorSpec(name, "float32", ("batch", *shape)) for name, shape in told.items()]
    entry = replace(unet, inputs=(*unet.inputs, *more))
    hint = missing_engine_hint(Path("b"), entry, backend="auto", precision="int8")
    assert hint == "sd-export build b --backend openvino --precision int8"


def test_manifest_on_disk_is_the_format(tiny_bundle: Bundle) -> None:
    data = json.loads((tiny_bundle.path / "bundle.json").read_text())
    assert list(data) == [
        "format_version",
        "model",
        "profile",
        "components",
        "engines",
        "certificate",
        "sizes",
        "files",
        "versions",
    ]
    assert data["components"]["unet"]["inputs"][0] == {
        "name": "sample",
        "dtype": "float32",
        "shape": ["batch", 4, 8, 8],
    }


def test_readme_blocks(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("onnxruntime")
    monkeypatch.chdir(tiny_bundle.path.parent)
    readme = Path(__file__).parents[2] / "engines" / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})  # noqa: S102
    assert capsys.readouterr().out == "(2, 4, 8, 8)\n"
