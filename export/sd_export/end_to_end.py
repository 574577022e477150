"""Proves a bundle from prompt to picture, against the unmodified pipeline of diffusers.

The bundle is drawn from as anyone will, by `sd_runtime`, before it is sealed.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from sd_engines.bundle import MANIFEST_NAME, PORTABLE_BACKENDS, CertificateEntry
from sd_export.graph_proof import proving_engine, words_of
from sd_export.kind import UPSCALERS, Kind
from sd_export.memory import release
from sd_export.precision import coarser
from sd_export.work import key_of
from sd_runtime.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sd_engines.manifest import Manifest
    from sd_engines.spec import Precision, Profile
    from sd_export.checkpoint import Checkpoint
    from sd_export.progress import StageLog
    from sd_export.verify import Arrays
    from sd_export.work import WorkFolder

PIXELS_WITHIN_1 = 0.999
"""Least share of a picture's values within 1/255 of the reference, in fp32."""
LATENTS_L2 = {"tf32": 5e-2, "fp16": 5e-2, "bf16": 2e-1, "fp8": 3e-1, "int8": 3e-1}
"""Largest relative L2 of the final latents, where the UNet computes in less than fp32."""
_SEED = 20_220_822
_PROMPT = "a red circle on a white background"
_MOST_STEPS = 3


def prove_end_to_end(
    manifest: Manifest,
    *,
    checkpoint: Checkpoint,
    backends: Sequence[str],
    reference_name: str,
    key: str,
    work: WorkFolder,
    log: StageLog,
) -> list[CertificateEntry]:
    """Draw one picture with each of ``backends`` that runs here, and compare.

    ``work.bundle`` holds all that ``manifest`` lists. Where no portable backend is asked for,
    ONNX Runtime draws from the graphs the engines were built of. `ExportError` where a picture
    misses its tolerance.
    """
    key = key_of({"job": key, "engines": [asdict(engine) for engine in manifest.engines]})
    record = f"end to end {manifest.profile.width}x{manifest.profile.height}"
    done = work.finished(record, key)
    if done is not None:
        log.skipped("end_to_end", "verify")
        return [CertificateEntry(**measured) for measured in done["certificate"]]
    defaults = checkpoint.defaults
    request = Request(
        prompt=_prompt(checkpoint),
        seed=_SEED,
        num_inference_steps=min(_MOST_STEPS, defaults.num_inference_steps),
        guidance_scale=defaults.guidance_scale,
        **_inputs(checkpoint, manifest.profile),
    )
    with log.stage("end_to_end", "reference"):
        (latents,) = manifest.components["vae_decoder"].inputs
        reference = _reference_picture(
            checkpoint, manifest.profile, request, tile=tuple(map(int, latents.shape[2:]))
        )
    release()
    if checkpoint.kind is Kind.LDM3D_UPSCALER:
        from sd_export.oracle import LDM3D_UPSCALER_REFERENCE

        reference_name = f"{reference_name}, {LDM3D_UPSCALER_REFERENCE}"
    if not any(backend in PORTABLE_BACKENDS for backend in backends):
        manifest = _with_onnxruntime(manifest, work.bundle)
        backends = (*backends, "onnxruntime")
    certificate: list[CertificateEntry] = []
    path = work.bundle / MANIFEST_NAME
    drawn = _what_draws(manifest, checkpoint, encodes=request.image is not None)
    path.write_text(drawn.to_json(), encoding="utf-8")
    try:
        for backend in backends:
            stage, must = f"verify {backend}", backend in PORTABLE_BACKENDS
            with (
                log.skipped_if_unable("end_to_end", stage, must=must),
                log.stage("end_to_end", stage) as result,
            ):
                measured = _verify(
                    work.bundle,
                    backend=backend,
                    precision=_unet_precision(manifest, backend),
                    request=request,
                    reference=reference,
                    reference_name=reference_name,
                )
                result.detail = words_of(measured)
                certificate.append(measured)
    finally:
        path.unlink()
    data = {"certificate": [asdict(measured) for measured in certificate]}
    work.finish(record, key, files=[], data=data)
    return certificate


def _prompt(checkpoint: Checkpoint) -> str:
    if checkpoint.kind is Kind.VARIATIONS:
        return ""
    words = dict.fromkeys(embedding.tokens[0] for embedding in checkpoint.embeddings)
    return " ".join([_PROMPT, *words])


def _inputs(checkpoint: Checkpoint, profile: Profile) -> dict[str, Any]:
    """The pictures that are drawn from, where it is not from text alone."""
    if checkpoint.kind in (Kind.TEXT, Kind.LDM3D) and not checkpoint.controlnets:
        return {}
    import numpy as np

    rows, columns = np.mgrid[: profile.height, : profile.width]
    image = np.stack([rows * 255 // profile.height, columns * 255 // profile.width, 0 * rows], -1)
    if checkpoint.controlnets:
        return {"control_image": [image.astype(np.uint8)] * len(checkpoint.controlnets)}
    if checkpoint.kind in UPSCALERS:
        scale = profile.vae_scale_factor if checkpoint.kind is Kind.X4_UPSCALER else 2
        small = image[::scale, ::scale]
        if checkpoint.kind is Kind.LDM3D_UPSCALER:
            depth = (rows * 65535 // profile.height)[::scale, ::scale]
            return {"image": small.astype(np.uint8), "depth_map": depth.astype(np.uint16)}
        return {"image": small.astype(np.uint8)}
    pictures = {"image": image.astype(np.uint8)}
    if checkpoint.kind is Kind.VARIATIONS:
        return pictures
    if checkpoint.kind is Kind.INPAINTING:
        pictures["mask"] = (255 * (rows < profile.height // 2)).astype(np.uint8)
    return {**pictures, "strength": 1.0}  # so that every step of few is run


def _reference_picture(
    checkpoint: Checkpoint, profile: Profile, request: Request, *, tile: tuple[int, ...]
) -> Arrays:
    """Latents float32 and pixels uint8 that the unmodified diffusers pipeline draws.

    ``tile`` is the latents' height and width that the VAE sees at once: with fewer than the
    profile's it works by the tiles of `sd_runtime`, which lie otherwise than diffusers'.
    """
    import numpy as np
    import torch

    from sd_export.load import quiet
    from sd_export.oracle import ldm3d_upscaler_inputs, load_pipeline

    inputs = _pipeline_inputs(checkpoint, profile, request)
    pipeline = load_pipeline(checkpoint)
    if tile != (profile.latent_height, profile.latent_width):
        from sd_export.tiled_vae import work_in_tiles

        work_in_tiles(pipeline.vae, *tile)
    generator = torch.Generator("cpu").manual_seed(_SEED)
    last: dict[str, torch.Tensor] = {}

    def keep(_pipe: object, _step: int, _timestep: object, tensors: dict[str, Any]) -> Any:
        last.update(tensors)
        return tensors

    inputs["output_type"] = "latent"
    if checkpoint.kind is Kind.LDM3D:  # whose pipeline fails on latents; others know no callback
        inputs |= {"output_type": "np", "callback_on_step_end": keep}
    with torch.inference_mode(), quiet():
        if checkpoint.kind is Kind.LDM3D_UPSCALER:
            inputs |= ldm3d_upscaler_inputs(
                pipeline, request, checkpoint=checkpoint, profile=profile, generator=generator
            )
        output = pipeline(
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=generator,
            **inputs,
        )
        if checkpoint.kind is Kind.LDM3D:
            latents, pixels = last["latents"], output.rgb
        else:
            latents = output.images
            images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
            pixels = pipeline.image_processor.postprocess(images, output_type="np")[..., :3]
    return {"latents": latents.numpy(), "pixels": np.round(pixels * 255).astype(np.uint8)}


def _pipeline_inputs(checkpoint: Checkpoint, profile: Profile, request: Request) -> dict[str, Any]:
    """What ``request`` draws from, in the words of its pipeline in diffusers."""
    inputs: dict[str, Any] = {}
    if request.control_image:
        inputs = {"image": [picture.image for picture in request.control_image]}
    if request.image is not None:
        inputs = {"image": request.image.image}
    if request.strength is not None:
        inputs["strength"] = request.strength
    if checkpoint.kind is not Kind.VARIATIONS:
        inputs["prompt"] = request.prompt
    if request.image is None or request.mask is not None or checkpoint.kind is Kind.VARIATIONS:
        inputs |= {"height": profile.height, "width": profile.width}
    if request.mask is not None:
        inputs["mask_image"] = request.mask.image
    return inputs


def _verify(
    staging: Path,
    *,
    backend: str,
    precision: Precision,
    request: Request,
    reference: Arrays,
    reference_name: str,
) -> CertificateEntry:
    """Draw the reference's picture through the runtime; `ExportError` where it differs.

    ``staging`` holds a complete bundle. ``precision`` is that of its UNet.
    """
    from sd_export.verify import certified, pixels_within_1, relative_l2
    from sd_runtime import Pipeline

    with Pipeline.load(staging, backend=backend) as pipeline:
        result = pipeline.generate(request)
    if precision == "fp32":
        figure = pixels_within_1(result.pixels, reference["pixels"])
        metric, tolerance = "pixels_within_1", PIXELS_WITHIN_1
        passed = figure >= tolerance
    else:
        figure = relative_l2(result.latents, reference["latents"])
        metric, tolerance = "relative_l2", LATENTS_L2[precision]
        passed = figure <= tolerance
    return certified(
        "end_to_end",
        backend,
        precision,
        reference=f"{reference_name}, {request.num_inference_steps} steps",
        metric=metric,
        figure=figure,
        tolerance=tolerance,
        passed=passed,
    )


def _what_draws(manifest: Manifest, checkpoint: Checkpoint, *, encodes: bool) -> Manifest:
    """``manifest`` with what draws a picture and no more: the rest has been proven by itself."""
    from sd_export.controlnet import control_components
    from sd_runtime.engines import drawing_components
    from sd_runtime.task import DEPTH_ESTIMATOR, ENCODER

    names = (*drawing_components(manifest), *control_components(checkpoint))
    if encodes:
        seers = (ENCODER, DEPTH_ESTIMATOR)
        names = (*names, *(name for name in seers if name in manifest.components))
    components = {name: manifest.components[name] for name in names}
    engines = tuple(engine for engine in manifest.engines if engine.component in components)
    return replace(manifest, components=components, engines=engines)


def _unet_precision(manifest: Manifest, backend: str) -> Precision:
    graph = manifest.components["unet"].precision
    (engine,) = (e for e in manifest.engines if (e.component, e.backend) == ("unet", backend))
    return coarser(graph, engine.precision)


def _with_onnxruntime(manifest: Manifest, folder: Path) -> Manifest:
    """``manifest`` with engines of ONNX Runtime too, which run its graphs anywhere."""
    engines = [
        proving_engine(folder / entry.file, component, entry, manifest.profile)
        for component, entry in manifest.components.items()
    ]
    return replace(manifest, engines=(*manifest.engines, *engines))
