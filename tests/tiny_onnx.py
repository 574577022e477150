"""Real bundles around graphs of one convolution, made in milliseconds."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sd_engines.backends.cuda import compute_capability
from sd_engines.bundle import (
    Bundle,
    ComponentEntry,
    EngineEntry,
    Manifest,
    hash_files,
    open_bundle,
    portable_entry,
)
from sd_engines.errors import BackendError
from sd_engines.seal import seal
from sd_engines.spec import ModelSpec, Profile, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines.spec import Precision

CHANNELS, SIZE, TOKENS, WIDTH = 4, 8, 77, 16
PROFILE = Profile(batch_size=2, height=SIZE * 8, width=SIZE * 8, vae_scale_factor=8)
MODEL = ModelSpec(
    source="tiny",
    revision=None,
    family="stable-diffusion-v1",
    license=None,
    prediction_type="epsilon",
    latent_channels=CHANNELS,
    vae_scaling_factor=0.18215,
    max_prompt_tokens=TOKENS,
    scheduler={"_class_name": "PNDMScheduler", "trained_betas": None},
)
UNET_INPUTS = (
    TensorSpec("sample", "float32", ("batch", CHANNELS, SIZE, SIZE)),
    TensorSpec("timestep", "float32", ("batch",)),
    TensorSpec("encoder_hidden_states", "float32", ("batch", TOKENS, WIDTH)),
)
UNET_OUTPUTS = (TensorSpec("noise_pred", "float32", ("batch", CHANNELS, SIZE, SIZE)),)


def needs(package: str) -> None:
    """Skip the test where ``package`` is not installed, without importing it."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU and its driver."""
    try:
        compute_capability()
    except BackendError:
        return False
    return True


def stale_plan(precision: Precision) -> EngineEntry:
    """A plan of the UNet by a TensorRT-RTX that nobody has any more."""
    return EngineEntry(
        component="unet",
        backend="tensorrt-rtx",
        version="1.0.0",
        target="any",
        precision=precision,
        file="engines/tensorrt-rtx-1.0.0-any/unet.engine",
        sha256="0" * 64,
        bytes=1,
        flags={},
        key="0" * 64,
    )


def int8_engine(component: str, **changes: str) -> EngineEntry:
    """What a manifest says of an engine in 8 bits; its file is nowhere."""
    engine = EngineEntry(
        component=component,
        backend="openvino",
        version="2026.1.0",
        target="cpu",
        precision="int8",
        file=f"engines/openvino-2026.1.0-cpu/{component}.engine",
        sha256="0" * 64,
        bytes=1,
        flags={"calibration": "0" * 64, "nncf": "3.4.0"},
        key="0" * 64,
    )
    return replace(engine, **changes)  # type: ignore[arg-type]


def _info(spec: TensorSpec) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, kind, spec.shape)


def unet_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The graph's weights: a 3×3 convolution, and a projection of the pooled text."""
    draw = np.random.default_rng(seed)
    return {
        "conv": draw.standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(np.float32) / 6,
        "bias": draw.standard_normal(CHANNELS).astype(np.float32),
        "text": draw.standard_normal((WIDTH, CHANNELS)).astype(np.float32),
    }


def write_unet(
    path: Path, *, seed: int = 0, opset: int = 20, dtype: str = "float32", external: bool = True
) -> None:
    """conv(sample) + mean(encoder_hidden_states)·text + timestep/1000, inside in ``dtype``."""
    inner = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = [numpy_helper.from_array(a.astype(dtype), n) for n, a in unet_weights(seed).items()]
    weights += [
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
        numpy_helper.from_array(np.array([-1, CHANNELS, 1, 1], np.int64), "as_image"),
        numpy_helper.from_array(np.array([-1, 1, 1, 1], np.int64), "as_scalar"),
        numpy_helper.from_array(np.array(0.001, dtype), "thousandth"),
    ]
    node = helper.make_node
    nodes = [
        node("Cast", ["sample"], ["x"], to=inner),
        node("Cast", ["timestep"], ["t"], to=inner),
        node("Cast", ["encoder_hidden_states"], ["e"], to=inner),
        node("Conv", ["x", "conv", "bias"], ["c"], pads=[1, 1, 1, 1]),
        node("ReduceMean", ["e", "axis"], ["m"], keepdims=0),
        node("MatMul", ["m", "text"], ["p"]),
        node("Reshape", ["p", "as_image"], ["p4"]),
        node("Mul", ["t", "thousandth"], ["t1"]),
        node("Reshape", ["t1", "as_scalar"], ["t4"]),
        node("Add", ["c", "p4"], ["s"]),
        node("Add", ["s", "t4"], ["y"]),
        node("Cast", ["y"], ["noise_pred"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes, "unet", [_info(s) for s in UNET_INPUTS], [_info(s) for s in UNET_OUTPUTS], weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=external,
        location=path.name + "_data",
        size_threshold=128,  # shapes stay inside: parsers read them while loading
    )
    onnx.checker.check_model(str(path))


def unet_reference(
    sample: np.ndarray, timestep: np.ndarray, encoder_hidden_states: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    """The same in numpy, float64."""
    weights = {name: array.astype(np.float64) for name, array in unet_weights(seed).items()}
    padded = np.pad(sample.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    image = np.einsum("nchwij,ocij->nohw", windows, weights["conv"])
    text = encoder_hidden_states.astype(np.float64).mean(axis=1) @ weights["text"]
    shift = weights["bias"] + text + timestep[:, None].astype(np.float64) / 1000
    return image + shift[:, :, None, None]


def unet_arrays(batch: int, *, seed: int = 1) -> dict[str, np.ndarray]:
    """Random inputs of ``batch`` rows."""
    draw = np.random.default_rng(seed)
    return {
        "sample": draw.standard_normal((batch, CHANNELS, SIZE, SIZE)).astype(np.float32),
        "timestep": draw.uniform(0, 1000, batch).astype(np.float32),
        "encoder_hidden_states": draw.standard_normal((batch, TOKENS, WIDTH)).astype(np.float32),
    }


def unet_entry(
    folder: Path,
    *,
    seed: int = 0,
    opset: int = 20,
    dtype: str = "float32",
    precision: Precision = "fp32",
) -> ComponentEntry:
    """Write the UNet below ``folder`` and say what a manifest says of it."""
    file = "unet/model.onnx"
    write_unet(folder / file, seed=seed, opset=opset, dtype=dtype)
    return ComponentEntry(
        file=file,
        files=hash_files(folder, [file, file + "_data"]),
        precision=precision,
        opset=opset,
        inputs=UNET_INPUTS,
        outputs=UNET_OUTPUTS,
    )


def make_manifest(folder: Path, *, seed: int = 0) -> Manifest:
    """Fill ``folder`` with a bundle's files; the manifest that belongs on top of them."""
    unet = unet_entry(folder, seed=seed)
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text("{}")
    return Manifest(
        model=MODEL,
        profile=PROFILE,
        components={"unet": unet},
        engines=tuple(
            portable_entry(
                "unet", unet, PROFILE, backend, version="1", target="cpu", precision=None
            )
            for backend in ("onnxruntime", "openvino")
        ),
        files=hash_files(folder, ["tokenizer/tokenizer.json"]),
        versions={"sd-toolkit": "0.1.0"},
    )


def make_bundle(path: Path, *, seed: int = 0) -> Bundle:
    """A sealed bundle at ``path``, for ONNX Runtime and OpenVINO on the CPU."""
    staging = path.with_name(f".{path.name}.staging")
    staging.mkdir(parents=True)
    seal(staging, path, make_manifest(staging, seed=seed))
    return open_bundle(path)
