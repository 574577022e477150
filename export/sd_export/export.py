"""From a checkpoint to a sealed bundle: `export`, and what it reports."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sd_engines.bundle import MANIFEST_NAME, Manifest, open_bundle
from sd_engines.errors import BundleError, ConfigError
from sd_engines.memory import peak_memory_bytes
from sd_engines.seal import seal
from sd_engines.spec import LOSSY, Defaults, Profile
from sd_export.checkpoint_files import stored_bytes
from sd_export.graph_proof import check_prover
from sd_export.job import RECORD_FILE, Job
from sd_export.kind import UPSCALERS, Kind
from sd_export.license import license_words
from sd_export.memory import settled
from sd_export.packages import check_backends
from sd_export.precision import check_quantizable, check_request
from sd_export.progress import StageLog, silent
from sd_export.source import find_checkpoint
from sd_export.work import work_folder
from sd_runtime.request import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sd_engines.spec import Precision
    from sd_export.checkpoint import Checkpoint
    from sd_export.progress import Progress, StageEvent

_MAX_PIXELS = 8192
_MAX_BATCH = 256
_MAX_PROMPT_CHUNKS = 12


@dataclass(frozen=True)
class ExportReport:
    """What an export made. ``stages`` are in their order; ``peak_bytes`` is of the process."""

    path: Path
    manifest: Manifest
    license: str
    stages: tuple[StageEvent, ...]
    peak_bytes: int
    was_done: bool


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    backends: Sequence[str] = ("onnxruntime",),
    precision: Precision | None = None,
    height: int | None = None,
    width: int | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    vae_tiling: bool = False,
    batch_size: int = 1,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    vae: str | None = None,
    preview_vae: str | None = None,
    max_prompt_chunks: int = 1,
    controlnets: Sequence[str] = (),
    feature_cache: bool = False,
    calibration_prompts: Sequence[str] | None = None,
    progress: Progress = silent,
) -> ExportReport:
    """Turn the checkpoint ``source`` into a bundle at ``output``, replacing an older bundle there.

    ``height`` and ``width`` in pixels; None means the checkpoint's own sample size. ``sizes`` are
    others that the bundle is to draw as well, height and width of each. With ``vae_tiling`` a VAE
    is made for the size in its config at most, and sees larger pictures by overlapping tiles.
    ``prediction_type`` is for a single file, as in `find_checkpoint`. ``num_inference_steps`` and
    ``guidance_scale`` are what requests to the bundle take that do not say; None means what the
    checkpoint's pipeline takes in diffusers, and distilled models want others. ``loras`` are files
    to fuse into its weights, each ``FILE`` or ``FILE=SCALE``. ``embeddings`` are files of
    textual inversion, each ``FILE`` or ``FILE=TOKEN``, whose tokens prompts then know. ``vae``
    takes the place of the checkpoint's own: a Hub id, a folder or a file, as in `with_vae`;
    ``preview_vae`` is a tiny one for pictures on the way. The UNet reads ``max_prompt_chunks``
    times as many tokens as the text encoder. ``controlnets`` are Hub ids or folders of
    ControlNets, each for one control picture of a request. With ``feature_cache`` the UNet
    gives its deep features too, and a second, shallow one takes them: what a request's
    ``cache_interval`` needs. ``calibration_prompts`` are what an int8 or fp8 UNet draws to be
    calibrated; None takes `calibration.PROMPTS`. Raises
    `ConfigError` for what cannot be asked, `ExportError` for a checkpoint that is not one, is
    broken, or whose engines miss their tolerance, `BackendError` where a backend fails. Nothing is
    left behind then. Interrupted, it leaves the stages that are done beside ``output``, and the
    next export of the same goes on from there.
    """
    backends = tuple(dict.fromkeys(backends))
    check_request(backends, precision, calibration_prompts)
    check_prover()
    check_backends(backends)
    if not 1 <= max_prompt_chunks <= _MAX_PROMPT_CHUNKS:
        raise ConfigError(
            f"--max-prompt-chunks {max_prompt_chunks} is not possible",
            f"Take 1 to {_MAX_PROMPT_CHUNKS}; 2 or 4 are enough for most prompts.",
        )
    asked = Request("", num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    target = Path(os.path.realpath(output))
    log = StageLog(progress)
    with work_folder(target, waiting=lambda: log.skipped("bundle", "wait")) as work:
        with log.stage("checkpoint", "find") as result:
            checkpoint = find_checkpoint(
                os.fspath(source),
                revision=revision,
                variant=variant,
                prediction_type=prediction_type,
            )
            checkpoint = replace(checkpoint, defaults=_defaults(checkpoint.defaults, asked))
            checkpoint = replace(checkpoint, max_prompt_chunks=max_prompt_chunks)
            if checkpoint.kind is Kind.VARIATIONS:
                asked_for = {
                    "--embedding": bool(embeddings),
                    "--max-prompt-chunks": max_prompt_chunks > 1,
                    "--controlnet": bool(controlnets),
                    "--lora": bool(loras),
                }
                _refuse(asked_for, "is for prompts, and the checkpoint reads a picture instead")
            if checkpoint.kind in UPSCALERS:
                tiled = {"--vae-tiling": vae_tiling}
                _refuse(tiled, "is not for upscalers, whose tiles are another thing")
            checkpoint = _with_additions(
                checkpoint,
                loras=loras,
                embeddings=embeddings,
                vae=vae,
                preview_vae=preview_vae,
                controlnets=controlnets,
                feature_cache=feature_cache,
            )
            result.detail = (
                f"{checkpoint.family}, {checkpoint.assumed or checkpoint.prediction_type}"
            )
            if precision in LOSSY:
                check_quantizable(
                    precision,
                    graph="fp32",
                    from_text=checkpoint.kind in (Kind.TEXT, Kind.LDM3D),
                    feature_cache=feature_cache,
                )
            if feature_cache:
                from sd_export.shallow_unet import reads_text

                reads_text(checkpoint.configs["unet"])  # refuses what cannot be cut
        own = _profile(checkpoint, height, width, batch_size=batch_size, own=True)
        others = (_profile(checkpoint, *size, batch_size=batch_size, own=False) for size in sizes)
        job = Job(
            checkpoint,
            tuple(dict.fromkeys((own, *others))),
            backends,
            precision,
            vae_tiling=vae_tiling,
            calibration_prompts=calibration_prompts,
            feature_cache=feature_cache,
            work=work,
            log=log,
        )
        manifest = _already_made(target, job.key)
        was_done = manifest is not None
        if manifest is None:
            work.check_room(stored_bytes(checkpoint))
            import sd_export.wrappers  # noqa: F401  (torch and its friends)

            with settled():
                manifest = job.run()
            with log.stage("bundle", "seal"):
                seal(work.bundle, target, manifest)
        else:
            log.skipped("bundle", "all", detail="already made, and unchanged")
    return ExportReport(
        path=target,
        manifest=manifest,
        license=license_words(checkpoint),
        stages=tuple(log.ended),
        peak_bytes=peak_memory_bytes(),
        was_done=was_done,
    )


def _with_additions(
    checkpoint: Checkpoint,
    *,
    loras: Sequence[str],
    embeddings: Sequence[str],
    vae: str | None,
    preview_vae: str | None,
    controlnets: Sequence[str],
    feature_cache: bool,
) -> Checkpoint:
    """``checkpoint`` with what `export` is asked to put into it or beside it."""
    if loras:
        from sd_export.lora import find_lora

        models = checkpoint.weights
        fused = tuple(find_lora(text, components=models) for text in loras)
        checkpoint = replace(checkpoint, loras=fused)
    if embeddings:
        from sd_export.embedding import find_embeddings

        widths = {
            name: int(checkpoint.configs[name]["hidden_size"]) for name in checkpoint.text_encoders
        }
        found = find_embeddings(embeddings, widths=widths)
        checkpoint = replace(checkpoint, embeddings=found)
    if vae is not None:
        from sd_export.vae import with_vae

        checkpoint = with_vae(checkpoint, vae)
    if preview_vae is not None:
        from sd_export.preview_vae import with_preview_vae

        checkpoint = with_preview_vae(checkpoint, preview_vae)
    if controlnets:
        from sd_export.controlnet import with_controlnets

        checkpoint = with_controlnets(checkpoint, controlnets, feature_cache=feature_cache)
    return checkpoint


def _defaults(own: Defaults, asked: Request) -> Defaults:
    """The checkpoint's ``own``, except what is asked for."""
    scale = asked.guidance_scale
    return replace(
        own,
        num_inference_steps=asked.num_inference_steps or own.num_inference_steps,
        guidance_scale=own.guidance_scale if scale is None else float(scale),
    )


def _refuse(asked: Mapping[str, bool], why: str) -> None:
    """`ConfigError` for an option that was asked for, and is not for this kind of checkpoint."""
    for option, given in asked.items():
        if given:
            raise ConfigError(f"{option} {why}", f"Leave {option} out.")


def _profile(
    checkpoint: Checkpoint, height: int | None, width: int | None, *, batch_size: int, own: bool
) -> Profile:
    """The shapes asked for: the checkpoint's ``own`` size or what takes its place, or one more."""
    factor = checkpoint.vae_scale_factor
    step = max(factor, 8)  # diffusers draws no other, whatever the VAE
    if checkpoint.kind in (Kind.X4_UPSCALER, Kind.X2_UPSCALER):
        # Of a small picture whose sides are no multiples of it diffusers leaves something out.
        step = factor * (factor if checkpoint.kind is Kind.X4_UPSCALER else 2)
    own_height, own_width = checkpoint.default_size
    height = own_height if height is None else height
    width = own_width if width is None else width
    for name, pixels in (("height", height), ("width", width)):
        if not step <= pixels <= _MAX_PIXELS or pixels % step:
            option = f"--{name} {pixels}" if own else f"--size {width}x{height}, its {name},"
            near = min(max(round(pixels / step), 1) * step, _MAX_PIXELS)
            raise ConfigError(
                f"{option} is not possible",
                f"Take a multiple of {step} up to {_MAX_PIXELS}; the nearest is {near}.",
            )
    if not 1 <= batch_size <= _MAX_BATCH:
        raise ConfigError(f"--batch-size {batch_size} is not possible", f"Take 1 to {_MAX_BATCH}.")
    return Profile(batch_size=batch_size, height=height, width=width, vae_scale_factor=factor)


def _already_made(target: Path, key: str) -> Manifest | None:
    """The manifest of the bundle at ``target`` if it is whole and made of the same, else None."""
    if not (target / MANIFEST_NAME).is_file():
        return None
    try:
        bundle = open_bundle(target)
        record = json.loads(bundle.verified_path(RECORD_FILE).read_text("utf-8"))
        if record.get("key") != key:
            return None
        bundle.verify()
    except (BundleError, ValueError):
        return None
    return bundle.manifest
