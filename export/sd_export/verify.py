"""Proves an engine against the original model, component by component.

The reference is the unmodified model of diffusers or transformers in float32. What sees or paints
pictures is called as diffusers' pipelines call it; text encoders, UNets and ControlNets as the
module that is traced calls them, which the picture at the end holds to the pipeline. Its outputs on
fixed inputs are stored while the model is in memory, so that engine and model never are together.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.bundle import CertificateEntry
from sd_engines.engine import load_engine
from sd_engines.errors import ExportError
from sd_engines.spec import BATCH, DEPTH, LOSSY, LOW_RES_LATENTS, NOISE_LEVEL, PICTURES, TIME_IDS
from sd_export.memory import release
from sd_export.precision import coarser
from sd_runtime.arrays import to_host
from sd_runtime.task import DEPTH_ESTIMATOR, IMAGE_ENCODER

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from sd_engines.entries import ComponentEntry, EngineEntry
    from sd_engines.spec import Precision, Profile, TensorSpec
    from sd_export.checkpoint import Checkpoint

    Arrays = Mapping[str, np.ndarray]

RELATIVE_L2 = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 5e-2, "fp8": 1e-1, "int8": 1e-1}
"""Largest ‖engine − reference‖ ÷ ‖reference‖ of a component, per precision.

8 bits are lossy by design, and held to what pictures stand: at 0.031 the shipped checkpoint still
draws 95.5 % of its captions right, at 0.21 only 89.0 % (benchmarks/README.md).
"""
_SEED = 20_220_822
_TIMESTEPS = (981.0, 21.0)
_LOG_SIGMAS = (0.6, -0.7)
"""Timesteps of a latent upscaler."""
_NOISE_LEVELS = (20, 0)


@dataclass(frozen=True)
class Proof:
    """Inputs of a component, what the reference gives for them, and what the reference is.

    Where rows share `PICTURES`, those of one picture lie side by side.
    """

    inputs: Arrays
    reference: Arrays
    reference_name: str


def probe_inputs(
    component: str, inputs: Sequence[TensorSpec], *, profile: Profile, vocab_size: int
) -> dict[str, np.ndarray]:
    """Fixed inputs for a component: rows that differ, of the size it meets in use."""
    rng = np.random.default_rng(_SEED)
    rows = 4 if component == "safety_checker" else min(2, profile.max_batch(component, inputs))
    shared = any(PICTURES in spec.shape for spec in inputs)
    arrays: dict[str, np.ndarray] = {}
    for spec in inputs:
        first = 2 * rows if shared and BATCH in spec.shape else rows
        shape = [first, *(int(size) for size in spec.shape[1:])]
        if spec.name == "input_ids":
            ids = rng.integers(0, vocab_size - 2, shape)
            ids[:, 0] = vocab_size - 2
            for row in range(rows):
                ids[row, 8 * (row + 1) :] = vocab_size - 1
            arrays[spec.name] = ids
        elif spec.name == "timestep":
            log_sigmas = any(other.name == LOW_RES_LATENTS for other in inputs)
            timesteps = _LOG_SIGMAS if log_sigmas else _TIMESTEPS
            arrays[spec.name] = np.array(timesteps[:rows], dtype=np.float32)
        elif spec.name == NOISE_LEVEL:
            arrays[spec.name] = np.array(_NOISE_LEVELS[:rows])
        elif spec.name == TIME_IDS:
            arrays[spec.name] = rng.integers(0, 1025, shape).astype(np.float32)
        elif spec.name in ("images", DEPTH):
            arrays[spec.name] = _pictures(rng, shape)
        elif spec.name == "mask":
            arrays[spec.name] = (rng.random(shape) < 0.5).astype(np.float32)
        else:
            arrays[spec.name] = rng.standard_normal(shape, dtype=np.float32)
    return arrays


def reference_outputs(
    module: torch.nn.Module,
    component: str,
    inputs: Arrays,
    outputs: Sequence[TensorSpec],
    *,
    checkpoint: Checkpoint,
    model: torch.nn.Module,
) -> dict[str, np.ndarray]:
    """What the original gives for ``inputs``; `ExportError` where it is not finite.

    ``module`` is the wrapper around ``model``. It is the reference of no model of pictures: theirs
    are diffusers' own paths, through Pillow where there is one. The shallow UNet's is the whole one
    with its deep features replaced.
    """
    import torch

    from sd_export.oracle import (
        decoded_images,
        depth_mask,
        encoded_images,
        image_embeds,
        nsfw_content_detected,
    )
    from sd_export.shallow_unet import shallow_reference

    if component == "safety_checker":
        return {outputs[0].name: nsfw_content_detected(checkpoint, model, inputs["images"])}
    if component == DEPTH_ESTIMATOR:
        factor = inputs["images"].shape[1] // int(outputs[0].shape[2])
        depth = depth_mask(checkpoint, model, inputs["images"], vae_scale_factor=factor)
        return _finite({outputs[0].name: depth}, component)
    if component == IMAGE_ENCODER:
        with torch.inference_mode():
            embeds = image_embeds(checkpoint, model, inputs["images"])
        return _finite({outputs[0].name: embeds}, component)
    parts: list[list[np.ndarray]] = [[] for _ in outputs]
    rows = max(map(len, inputs.values()))
    with torch.inference_mode():
        for call in _calls(inputs, rows):
            most = max(map(len, call.values()))
            tensors = {n: torch.from_numpy(a.repeat(most // len(a), 0)) for n, a in call.items()}
            if component == "unet_shallow":
                results: Any = shallow_reference(model, tensors)
            elif component in ("vae_decoder", "preview_decoder"):
                gives_depth = len(outputs) > 1
                results = decoded_images(model, tensors["latents"], gives_depth=gives_depth)
            elif component == "vae_encoder":
                results = encoded_images(model, list(tensors.values()))
            else:
                results = module(*tensors.values())
            results = results if isinstance(results, tuple) else (results,)
            for part, result in zip(parts, results, strict=True):
                part.append(result.numpy())
    named = {s.name: np.concatenate(part) for s, part in zip(outputs, parts, strict=True)}
    return _finite(named, component)


def _finite(outputs: dict[str, np.ndarray], component: str) -> dict[str, np.ndarray]:
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise ExportError(
                f"the original model itself gives {name} that are not finite",
                "The weights are broken; use another revision or file of the checkpoint.",
                component=component,
                stage="verify",
            )
    return outputs


def verify_engine(
    path: Path,
    engine: EngineEntry,
    *,
    component: ComponentEntry,
    profile: Profile,
    proof: Proof,
) -> CertificateEntry:
    """Run the engine at ``path`` on the proof's inputs; `ExportError` where its figure is too bad.

    `BackendError` and `EngineMismatchError` pass through where it cannot run on this machine.
    """
    outputs = run_engine(path, engine, component=component, profile=profile, inputs=proof.inputs)
    precision = coarser(component.precision, engine.precision)
    reference = proof.reference
    if next(iter(reference.values())).dtype == bool:
        figure = min(float((outputs[n] == reference[n]).mean()) for n in reference)
        metric, tolerance, passed = "rows_equal", 1.0, figure == 1.0
    else:
        figure = max(relative_l2(outputs[n], reference[n]) for n in reference)
        metric, tolerance = "relative_l2", RELATIVE_L2[precision]
        passed = figure <= tolerance
    return certified(
        engine.component,
        engine.backend,
        precision,
        reference=proof.reference_name,
        metric=metric,
        figure=figure,
        tolerance=tolerance,
        passed=passed,
    )


def run_engine(
    path: Path,
    engine: EngineEntry,
    *,
    component: ComponentEntry,
    profile: Profile,
    inputs: Arrays,
) -> dict[str, np.ndarray]:
    """The engine at ``path`` on all rows of ``inputs``, in batches that the profile allows."""
    batch = profile.max_batch(engine.component, component.inputs)
    with load_engine(path, component=component, engine=engine, max_batch=batch) as opened:
        parts = [
            {name: to_host(array) for name, array in opened(**call).items()}
            for call in _calls(inputs, batch)
        ]
    release()
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _calls(inputs: Arrays, max_batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Parts of ``inputs``: so many rows, or those of one picture where rows share any of them."""
    lengths = [len(array) for array in inputs.values()]
    rows, pictures = max(lengths), min(lengths)
    calls = pictures if pictures < rows else -(-rows // max_batch)
    for call in range(calls):
        part = {}
        for name, array in inputs.items():
            size = len(array) // pictures if pictures < rows else max_batch
            part[name] = array[call * size : (call + 1) * size]
        yield part


def certified(
    component: str,
    backend: str,
    precision: Precision,
    *,
    reference: str,
    metric: str,
    figure: float,
    tolerance: float,
    passed: bool,
) -> CertificateEntry:
    """The certificate's entry, or `ExportError` where the figure did not pass."""
    if not passed:
        raise ExportError(
            f"{metric} is {figure:.3g} against {reference}, tolerance {tolerance:.3g} "
            f"({backend}, {precision})",
            "Nothing was made. Try --calibration-prompts FILE, with prompts of the kind that this "
            "model is asked, or another --precision."
            if precision in LOSSY
            else "No bundle was made. Try --precision fp32 or another --backend.",
            component=component,
            stage="verify",
        )
    return CertificateEntry(
        component=component,
        backend=backend,
        precision=precision,
        reference=reference,
        metric=metric,
        figure=figure,
        tolerance=tolerance,
        measured_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def relative_l2(found: np.ndarray, reference: np.ndarray) -> float:
    """‖found − reference‖ ÷ ‖reference‖ in float64; infinite where ``found`` is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    wanted = reference.astype(np.float64)
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-12))


def pixels_within_1(found: np.ndarray, reference: np.ndarray) -> float:
    """Share of the uint8 values that differ by at most 1 of 255."""
    return float((np.abs(found.astype(np.int16) - reference) <= 1).mean())


def _pictures(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Smooth random pictures with a little grain, float32 in [0, 1]."""
    rows, height, width, channels = shape
    y, x = (
        np.arange(height)[:, None, None] * 8 // height,
        np.arange(width)[None, :, None] * 8 // width,
    )
    coarse = rng.random((rows, 8, 8, channels), dtype=np.float32)
    grain = rng.random((rows, height, width, channels), dtype=np.float32)
    pictures: np.ndarray = 0.9 * coarse[:, y, x, np.arange(channels)] + 0.1 * grain
    return pictures
