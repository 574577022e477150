"""Real bundles of tiny random checkpoints, and diffusers' own pipeline on the same weights."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from controlnets import make_controlnet
from depth_estimators import LARGE, make_depth_checkpoint
from ldm3d import make_ldm3d_checkpoint
from sd_runtime import Pipeline, Request
from sd_runtime.control_options import CONTROL_NUMBERS, numbers
from sd_runtime.scheduler_config import SCHEDULERS
from tiny import SMALLEST, make_checkpoint
from tiny_upscaler import make_latent_upscaler, make_ldm3d_upscaler, make_upscaler
from tiny_variation import make_variation_checkpoint
from tiny_xl import make_xl_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline, StableDiffusionPipeline

SMALL: dict[str, Any] = {**SMALLEST, "sample_size": 16}
SUSPECT = Request("a cat", seed=0, num_images_per_prompt=12, num_inference_steps=1)
"""Twelve pictures, some of which the safety checker of ``guarded_model`` flags."""


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: on tiny tensors more of them only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class TinyModel:
    """One checkpoint, the bundle made of it, and two pipelines that should agree."""

    checkpoint: Path
    bundle: Path
    pipeline: Pipeline
    oracle: DiffusionPipeline
    controlnets: tuple[Any, ...] = ()

    def expected(self, request: Request) -> tuple[np.ndarray, np.ndarray, list[bool] | None]:
        """What diffusers makes of ``request``: pixels uint8, final latents, nsfw flags.

        Its pipeline for the task is made of the oracle's parts, and handed one input a picture.
        """
        import torch

        latents = []

        def keep(_pipe: object, _step: int, _timestep: object, tensors: dict[str, Any]) -> Any:
            latents.append(tensors["latents"].numpy().copy())
            return tensors

        names = ("num_inference_steps", "guidance_scale")  # where silent, diffusers' own
        given = {name: getattr(request, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        negative = list(request.negative_prompts)
        oracle, kind, parts = self.oracle, "", dict(self.oracle.components)
        inputs: dict[str, Any] = {}
        if request.image is not None:
            kind, inputs["image"] = "Img2Img", [request.image.image] * request.num_images
            if "depth_estimator" in parts:
                kind = ""  # the oracle's own
            if request.depth_map is not None:
                inputs["depth_map"] = torch.from_numpy(request.depth_map.values)[None]
            if request.mask is not None:
                kind, inputs["mask_image"] = "Inpaint", [request.mask.image] * request.num_images
            if request.strength is not None:
                inputs["strength"] = request.strength
        if request.control_image is not None:
            pictures = [picture.image for picture in request.control_image]
            inputs["image" if request.image is None else "control_image"] = pictures
            inputs["guess_mode"] = request.guess_mode
            for name in CONTROL_NUMBERS:
                values = numbers(getattr(request, name))
                inputs[name] = list(values * (len(pictures) // len(values)))
            parts["controlnet"] = list(self.controlnets)
            kind = f"ControlNet{kind}"
        if kind != "Img2Img":  # which draws in its picture's size
            profile = self.pipeline.profile
            inputs |= {
                "height": request.height or profile.height,
                "width": request.width or profile.width,
            }
        if kind:
            oracle = _for_task(oracle, kind, parts)
            oracle.set_progress_bar_config(disable=True)
        with one_thread():
            output = oracle(
                list(request.prompts),
                negative_prompt=None if negative[0] is None else negative,
                generator=[
                    torch.Generator("cpu").manual_seed(image.seed) for image in request.images()
                ],
                num_images_per_prompt=request.num_images_per_prompt,
                eta=request.eta,
                callback_on_step_end=keep,
                **given,
                **inputs,
            )
        pixels = np.stack([np.asarray(image) for image in output.images])
        return pixels, latents[-1], getattr(output, "nsfw_content_detected", None)

    def assert_same(self, request: Request) -> None:
        """Pixels within 1/255 for ≥ 99.9 %, final latents within 1e-4 (relative L2), same flags."""
        result = self.pipeline.generate(request)
        with self._scheduled(request.scheduler):
            pixels, latents, flags = self.expected(request)
        assert result.pixels.dtype == np.uint8
        assert result.pixels.shape == pixels.shape
        assert np.linalg.norm(result.latents - latents) <= 1e-4 * np.linalg.norm(latents)
        within = np.abs(result.pixels.astype(int) - pixels.astype(int)) <= 1
        assert within.mean() >= 0.999
        assert result.nsfw_content_detected == (None if flags is None else tuple(flags))

    @contextmanager
    def _scheduled(self, name: str | None) -> Iterator[None]:
        """diffusers' pipeline with the scheduler ``name``, of the checkpoint's own config."""
        import diffusers

        own = self.oracle.scheduler
        if name is not None:
            sampler = SCHEDULERS[name]
            kind = getattr(diffusers, sampler.class_name)
            self.oracle.scheduler = kind.from_config({**own.config, **sampler.overrides})
        try:
            yield
        finally:
            self.oracle.scheduler = own


@dataclass(frozen=True)
class TinyUpscaler(TinyModel):
    """An upscaler, of pixels or latents: their pipelines in diffusers take other arguments."""

    def expected(self, request: Request) -> tuple[np.ndarray, np.ndarray, list[bool] | None]:
        """What diffusers makes of ``request``, as `TinyModel.expected`; it checks nothing."""
        import torch

        images, latents = request.images(), []
        names = ("num_inference_steps", "guidance_scale", "noise_level")  # as `TinyModel.expected`
        given = {name: getattr(request, name) for name in names}
        given["eta"] = request.eta or None  # of which the latent one knows nothing
        with one_thread():
            output = self.oracle(
                [image.prompt for image in images],
                image=[request.image.image] * len(images),
                negative_prompt=[image.negative_prompt or "" for image in images],
                generator=[torch.Generator("cpu").manual_seed(image.seed) for image in images],
                callback=lambda _step, _timestep, tensor: latents.append(tensor.numpy().copy()),
                **{name: value for name, value in given.items() if value is not None},
            )
        pixels = np.stack([np.asarray(image) for image in output.images])
        return pixels, latents[-1], None


def _for_task(oracle: DiffusionPipeline, kind: str, parts: dict[str, Any]) -> DiffusionPipeline:
    """Diffusers' pipeline of the ``kind``, such as "Img2Img", of its ``parts``."""
    import diffusers

    config = oracle.config
    options: dict[str, Any] = {"requires_safety_checker": False}
    xl = "text_encoder_2" in oracle.components
    if xl:
        options = {"force_zeros_for_empty_prompt": config["force_zeros_for_empty_prompt"]}
        if kind != "ControlNet":
            options["requires_aesthetics_score"] = config.get("requires_aesthetics_score", False)
        options["add_watermarker"] = False
    family = f"StableDiffusion{'XL' if xl else ''}"
    if kind == "Img2Img" and oracle.unet.config.time_cond_proj_dim is not None:
        family = "LatentConsistencyModel"
    pipeline_class = getattr(diffusers, f"{family}{kind}Pipeline")
    return pipeline_class(**parts, **options)


@contextmanager
def tiny_model_in(
    folder: Path,
    *,
    batch_size: int,
    safety_checker: bool = False,
    controlnets: Sequence[dict[str, Any]] = (),
    **checkpoint_options: Any,
) -> Iterator[TinyModel]:
    """Make, export and open a tiny model below ``folder``; its engines are freed at the end.

    ``controlnets`` are the configs of those it has, where they are not what `make_controlnet` says.
    """
    checkpoint = make_checkpoint(
        folder / "checkpoint", safety_checker=safety_checker, **checkpoint_options
    )
    with exported(
        checkpoint, batch_size=batch_size, safety_checker=safety_checker, controlnets=controlnets
    ) as model:
        yield model


@contextmanager
def exported(
    checkpoint: Path,
    *,
    batch_size: int,
    safety_checker: bool = False,
    controlnets: Sequence[dict[str, Any]] = (),
    height: int | None = None,
    width: int | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    feature_cache: bool = False,
) -> Iterator[TinyModel]:
    """Export ``checkpoint`` to a folder beside it and open that; frees its engines at the end."""
    from diffusers import ControlNetModel, DiffusionPipeline

    from sd_export import export

    scheduler = checkpoint / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**config, "clip_sample": False}))  # as real ones have it
    folder = checkpoint.parent
    bundle = folder / "bundle"
    with one_thread():
        oracle = DiffusionPipeline.from_pretrained(checkpoint)
        oracle.set_progress_bar_config(disable=True)
        if safety_checker:
            divide_pictures(oracle)
            oracle.safety_checker.save_pretrained(checkpoint / "safety_checker")
        made = [
            make_controlnet(folder / f"controlnet{seed}", checkpoint, seed=seed, **config)
            for seed, config in enumerate(controlnets)
        ]
        nets = tuple(ControlNetModel.from_pretrained(path) for path in made)
        export(
            checkpoint,
            bundle,
            batch_size=batch_size,
            controlnets=list(map(str, made)),
            height=height,
            width=width,
            sizes=sizes,
            feature_cache=feature_cache,
        )
    with Pipeline.load(bundle, threads=1) as pipeline:
        yield TinyModel(checkpoint, bundle, pipeline, oracle, nets)


def divide_pictures(oracle: StableDiffusionPipeline) -> None:
    """Set the random checker's thresholds so that it flags some of `SUSPECT`'s pictures, not all.

    Only concept 0 counts: its threshold goes into the widest gap between two pictures' scores.
    """
    import torch

    checker, oracle.safety_checker = oracle.safety_checker, None
    seeds = [image.seed for image in SUSPECT.images()]
    pictures = oracle(
        [str(SUSPECT.prompt)] * len(seeds),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        num_inference_steps=SUSPECT.num_inference_steps,
    ).images
    with torch.no_grad():
        pixels = oracle.feature_extractor(pictures, return_tensors="pt").pixel_values
        embeds = checker.visual_projection(checker.vision_model(pixels)[1])
        scores = torch.cosine_similarity(embeds, checker.concept_embeds[:1]).sort().values
        widest = int(scores.diff().argmax())
        checker.concept_embeds_weights.fill_(2.0)  # above any cosine
        checker.special_care_embeds_weights.fill_(2.0)
        checker.concept_embeds_weights[0] = scores[widest : widest + 2].mean()
    oracle.safety_checker = checker


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """64×64 pictures, two at a time, PNDM, epsilon; a UNet of one level."""
    with tiny_model_in(
        tmp_path_factory.mktemp("tiny"), batch_size=2, block_out_channels=(32,)
    ) as model:
        yield model


@pytest.fixture(scope="session")
def guarded_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """Another shape: 24×24 pictures from a factor of 2, v_prediction, DDIM, a safety checker."""
    with tiny_model_in(
        tmp_path_factory.mktemp("guarded"),
        batch_size=1,
        seed=1,
        safety_checker=True,
        prediction_type="v_prediction",
        scheduler="DDIMScheduler",
        sample_size=12,
        vae_block_out_channels=(8, 16),
        cross_attention_dim=48,
    ) as model:
        yield model


@pytest.fixture(scope="session")
def consistency_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """As SimianLuo/LCM_Dreamshaper_v7."""
    with tiny_model_in(
        tmp_path_factory.mktemp("lcm"),
        batch_size=2,
        time_cond_proj_dim=256,
        scheduler="LCMScheduler",
        **SMALL,
    ) as model:
        yield model


@pytest.fixture(scope="session")
def v2_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """As stabilityai/stable-diffusion-2-1."""
    with tiny_model_in(
        tmp_path_factory.mktemp("v2"),
        batch_size=1,
        v2=True,
        tokenizer="vocab.json",
        prediction_type="v_prediction",
        scheduler="DDIMScheduler",
        scheduler_options={"set_alpha_to_one": False},
        **SMALL,
    ) as model:
        yield model


@pytest.fixture(scope="session")
def inpainting_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """A UNet of nine channels, which is fed the mask: 24×24 pictures, two at a time, DDIM."""
    with tiny_model_in(
        tmp_path_factory.mktemp("inpainting"),
        batch_size=2,
        inpainting=True,
        seed=2,
        scheduler="DDIMScheduler",
        **{**SMALL, "sample_size": 12, "vae_block_out_channels": (8, 16)},
    ) as model:
        yield model


@pytest.fixture(scope="session")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """As stabilityai/stable-diffusion-2-depth: 24×24 pictures, two at a time."""
    checkpoint = make_depth_checkpoint(
        tmp_path_factory.mktemp("depth") / "checkpoint",
        estimator=LARGE,
        seed=4,
        v2=True,
        **{**SMALL, "sample_size": 12, "vae_block_out_channels": (8, 16)},
    )
    with exported(checkpoint, batch_size=2) as model:
        yield model


@pytest.fixture(scope="session")
def variation_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """As lambdalabs/sd-image-variations-diffusers: 24×24 pictures, two at a time."""
    checkpoint = make_variation_checkpoint(
        tmp_path_factory.mktemp("variation") / "checkpoint",
        seed=5,
        **{**SMALL, "sample_size": 12, "vae_block_out_channels": (8, 16)},
    )
    with exported(checkpoint, batch_size=2) as model:
        yield model


@pytest.fixture(scope="session")
def controlled_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """Two ControlNets, one of which sees blue before red: 24×24 pictures, two at a time, DDIM."""
    with tiny_model_in(
        tmp_path_factory.mktemp("controlled"),
        batch_size=2,
        seed=3,
        scheduler="DDIMScheduler",
        controlnets=[{}, {"controlnet_conditioning_channel_order": "bgr"}],
        **{**SMALL, "sample_size": 12, "vae_block_out_channels": (8, 8)},
    ) as model:
        yield model


@pytest.fixture(scope="session")
def xl_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """As stabilityai/stable-diffusion-xl-base-1.0: 16×16 pictures, two at a time."""
    folder = tmp_path_factory.mktemp("xl")
    with exported(make_xl_checkpoint(folder / "checkpoint"), batch_size=2) as model:
        yield model


@pytest.fixture(scope="session")
def refiner_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """As stabilityai/stable-diffusion-xl-refiner-1.0, and of ``xl_model``'s latents."""
    folder = tmp_path_factory.mktemp("refiner")
    checkpoint = make_xl_checkpoint(
        folder / "checkpoint", refiner=True, seed=1, block_out_channels=(16,), text_layers=3
    )
    with exported(checkpoint, batch_size=2) as model:
        yield model


@pytest.fixture(scope="session")
def controlled_xl_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """16×16 pictures, two at a time; of its two ControlNets the second reads no prompt."""
    folder = tmp_path_factory.mktemp("controlled_xl") / "checkpoint"
    make_xl_checkpoint(folder, seed=6, block_out_channels=(16,))
    with exported(folder, batch_size=2, controlnets=[{}, {"reads_prompt": False}]) as model:
        yield model


@pytest.fixture(scope="session", params=[4, 6])
def ldm3d_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TinyModel]:
    """As Intel/ldm3d-4c and Intel/ldm3d: 16×16 pictures, two at a time; the first is checked.

    With this seed some of what the tests draw is flagged, and some is not.
    """
    folder = tmp_path_factory.mktemp("ldm3d") / "checkpoint"
    checker = request.param == 4
    shape = {**SMALL, "text_layers": 2}
    make_ldm3d_checkpoint(folder, channels=request.param, safety_checker=checker, seed=1, **shape)
    with exported(folder, batch_size=2) as model:
        yield model


@pytest.fixture(scope="session")
def sized_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """16×40 and 24×16 pictures, two at a time, of an XL checkpoint, which is told so.

    Its own are square. It has a shallow UNet.
    """
    folder = tmp_path_factory.mktemp("sized") / "checkpoint"
    make_xl_checkpoint(folder, block_out_channels=(16,))
    sizes: dict[str, Any] = {"height": 16, "width": 40, "sizes": [(24, 16)]}
    with exported(folder, batch_size=2, feature_cache=True, **sizes) as model:
        yield model


@pytest.fixture(scope="session")
def upscaler_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyUpscaler]:
    """As stabilityai/stable-diffusion-x4-upscaler: 8×8 pictures to 32×32, two at a time."""
    folder = tmp_path_factory.mktemp("upscaler")
    with exported(make_upscaler(folder / "checkpoint"), batch_size=2) as model:
        yield TinyUpscaler(**vars(model))


@pytest.fixture(scope="session")
def latent_upscaler_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyUpscaler]:
    """As stabilityai/sd-x2-latent-upscaler: 8×8 pictures to 16×16, two at a time."""
    folder = tmp_path_factory.mktemp("latent_upscaler")
    with exported(make_latent_upscaler(folder / "checkpoint"), batch_size=2) as model:
        yield TinyUpscaler(**vars(model))


@pytest.fixture(scope="session")
def ldm3d_upscaler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """As Intel/ldm3d-sr: pictures of any size to 16×24, two at a time."""
    from sd_export import export

    folder = tmp_path_factory.mktemp("ldm3d_upscaler")
    with one_thread():
        make_ldm3d_upscaler(folder / "checkpoint")
        export(folder / "checkpoint", folder / "bundle", batch_size=2, height=16, width=24)
    with Pipeline.load(folder / "bundle", threads=1) as pipeline:
        yield pipeline


@pytest.fixture
def suspect() -> Request:
    """`SUSPECT`: some of its pictures are flagged in ``guarded_model``, and some are not."""
    return SUSPECT


CLUSTER = """
import ray
context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(context.address_info["gcs_address"], flush=True)
input()
"""


@dataclass(frozen=True)
class RayCluster:
    """A cluster of two cores on this machine: what lets others in, and who started it."""

    environment: dict[str, str]
    pid: int


@pytest.fixture(scope="session")
def needs_ray() -> None:
    """Skip where it is not installed."""
    pytest.importorskip("ray", reason='400 MB, so not in the dev extra: pip install -e ".[ray]"')


@pytest.fixture(scope="session")
def ray_cluster(needs_ray: None) -> Iterator[RayCluster]:
    """One for all tests: it takes many seconds to start."""
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address
        yield RayCluster({**environment, "RAY_ADDRESS": address}, process.pid)
        process.communicate("\n", timeout=60)
