"""Prompts to pictures: opens a bundle's engines once, then answers requests."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Self

import numpy as np

from sd_engines.bundle import open_bundle
from sd_engines.closing import Closing
from sd_engines.spec import STABLE_DIFFUSION_XL
from sd_runtime.arrays import to_host
from sd_runtime.conditioning import PromptEncoder, pooled_inputs
from sd_runtime.controlnet import ControlEncoder
from sd_runtime.decoder import Decoder
from sd_runtime.denoise import denoise
from sd_runtime.engine_set import EngineSet
from sd_runtime.engines import text_encoders
from sd_runtime.guidance import Safety
from sd_runtime.image_encoder import ImageEncoder
from sd_runtime.input_image import InputImage
from sd_runtime.lora import Lora, find_loras
from sd_runtime.picture_reader import PictureReader
from sd_runtime.plan import max_prompt_chunks, plan
from sd_runtime.recipe import fingerprint, recipe_of
from sd_runtime.result import Result, Step
from sd_runtime.start import Start, begin
from sd_runtime.timing import Timings, clock
from sd_runtime.tokenizer import Tokenizer
from sd_runtime.upscaling import noised

if TYPE_CHECKING:
    import os
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from sd_engines.bundle import Bundle
    from sd_engines.entries import EngineEntry
    from sd_engines.spec import Precision, Profile
    from sd_runtime.conditioning import PromptEmbeds
    from sd_runtime.denoise import Row
    from sd_runtime.image_encoder import Source
    from sd_runtime.noise import NoiseStream
    from sd_runtime.plan import Plan
    from sd_runtime.recipe import Recipe
    from sd_runtime.request import ImageRequest, Request

SHALLOW = "unet_shallow"
TOKENIZER_OF = {
    "text_encoder": "tokenizer/tokenizer.json",
    "text_encoder_2": "tokenizer_2/tokenizer.json",
}


class Pipeline(Closing):
    """A bundle ready to draw. One request at a time; a context manager that frees its engines."""

    def __init__(
        self,
        engines: EngineSet,
        tokenizers: Mapping[str, Tokenizer],
        *,
        refiner: Pipeline | None = None,
    ) -> None:
        self.bundle = engines.bundle
        self.refiner = refiner
        self._engines = engines
        self._others: dict[tuple[int, int], Pipeline] = {}
        self._tokenizers = dict(tokenizers)
        self._prompts = self._prompt_encoder()
        self._decoder = Decoder(engines.__getitem__, self.bundle.manifest)
        self._images = ImageEncoder(engines.__getitem__, self.profile)
        self._reader = PictureReader(engines.__getitem__)
        self._controls = ControlEncoder(engines.__getitem__)
        self.fingerprint = fingerprint(self.bundle.manifest)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = "auto",
        threads: int | None = None,
        precision: Precision | None = None,
        request: Request | None = None,
        num_steps: int | None = None,
        loras: Sequence[str | Lora] = (),
        refiner: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Open the bundle at ``path`` and every engine that text-to-image needs.

        It draws the size of ``request`` or, without one, the bundle's own; engines of its other
        sizes are opened for the first request that asks for them, and kept.
        The VAE's encoder is opened for the first request that starts from a picture, and so is a
        depth estimator; the shallow UNet for the first with a cache_interval, a ControlNet for the
        first that it counts in.

        ``backend`` is one of the bundle's, or "auto" for the one whose UNet is fastest here, which
        is measured once and remembered (`sd_engines.choice`); ``threads`` bounds a CPU backend's.
        ``precision`` is the UNet's, where the bundle has more than one; None is never int8 unless
        there is nothing else.
        Engines that compile for a number of pictures do so when it is first asked for; given a
        ``request``, they do so here, side by side, and requests like it are answered at once.
        ``num_steps`` says how many UNet calls will be asked for in all, where that is known: "auto"
        then takes the engine that is done first, opening it among it.
        ``loras``, each ``FILE.safetensors`` or ``FILE.safetensors=SCALE``, are put on the engines,
        as far as a backend's weights can be changed; `use_loras` takes others.
        ``refiner`` is a second bundle, which goes on with every picture where this one stops
        (`sd_runtime.refiner`), without the LoRAs.
        Raises `BundleError`, `EngineMismatchError`, `BackendError`, or `ConfigError` for an
        unknown backend, a LoRA of another model, and as `plan` does.
        """
        bundle = open_bundle(path)
        found = find_loras(loras)
        second = None if refiner is None else open_bundle(refiner)
        planned = None
        if request is not None:
            refining = None if second is None else second.manifest
            planned = plan(request, bundle.manifest, refiner=refining)
            size = planned.profile.height, planned.profile.width
            bundle, second = bundle.at(*size), None if second is None else second.at(*size)
        other = None
        if second is not None:
            refining_plan = planned.refining if planned else None
            other = cls._open(
                second, refining_plan, backend=backend, threads=threads, num_steps=num_steps
            )
        try:
            return cls._open(
                bundle,
                planned,
                backend=backend,
                threads=threads,
                precision=precision,
                num_steps=num_steps,
                loras=found,
                refiner=other,
            )
        except BaseException:
            if other is not None:
                other.close()
            raise

    @classmethod
    def _open(
        cls,
        bundle: Bundle,
        planned: Plan | None,
        *,
        backend: str,
        threads: int | None,
        precision: Precision | None = None,
        num_steps: int | None = None,
        loras: Sequence[Lora] = (),
        refiner: Self | None = None,
    ) -> Self:
        max_tokens = bundle.manifest.model.max_prompt_tokens
        tokenizers = {
            name: Tokenizer.load(bundle.verified_path(TOKENIZER_OF[name]), max_tokens=max_tokens)
            for name in text_encoders(bundle.manifest)
        }
        engines = EngineSet.open(
            bundle,
            planned,
            backend=backend,
            threads=threads,
            precision=precision,
            num_steps=num_steps,
            loras=loras,
        )
        return cls(engines, tokenizers, refiner=refiner)

    def use_loras(self, loras: Sequence[str | Lora]) -> None:
        """Put these LoRAs on the engines in place of those that are there; none takes them off.

        Where one is refused, everything stays as it is. Raises as `load`.
        """
        found = find_loras(loras)
        self._close_others()
        self._engines.use_loras(found)
        self._prompts = self._prompt_encoder()

    def generate(self, request: Request) -> Result:
        """Draw all pictures of ``request``.

        Raises `ConfigError` for what the bundle cannot do, `BackendError` where an engine fails
        or its output is no picture.
        """
        for step in self.stream(request):
            if step.result is not None:
                return step.result
        raise AssertionError("the last step holds the result")

    def stream(self, request: Request) -> Generator[Step]:
        """The same, step by step: for progress, previews, and cancelling by ``close()``."""
        refiner = None if self.refiner is None else self.refiner.bundle.manifest
        planned = plan(request, self.bundle.manifest, refiner=refiner)
        sized = self._at(planned.profile.height, planned.profile.width)
        return sized._stream(replace(planned, request=planned.request.seeded()))

    def _at(self, height: int, width: int) -> Pipeline:
        """The pipeline that draws this size: this one, or one beside it.

        That one runs the engines of this one where its graphs are the same.
        """
        size = height, width
        if size == (self.profile.height, self.profile.width):
            return self
        if size not in self._others:
            self._others[size] = type(self)(
                self._engines.at(self.bundle.at(*size)),
                self._tokenizers,
                refiner=None if self.refiner is None else self.refiner._at(*size),
            )
        return self._others[size]

    def _stream(self, plan: Plan) -> Generator[Step]:
        start, timings = clock(), Timings()
        request, num_rows = plan.request, plan.num_rows
        images = request.images()
        drawn = images if plan.upscaling is None else plan.upscaling.tiles_of(images)
        size = self.profile.batch_size
        texts = [plan.texts(image) for image in images]
        if plan.task.reads_image:
            embeds = self._reader.encode(request.image, texts, timings=timings)
        else:
            embeds = self._prompts.encode(
                texts, prompt_weighting=request.prompt_weighting, timings=timings
            )
        num_steps = plan.num_steps(size)
        latents, decoded = [], []
        for first in range(0, len(drawn), size):
            batch = drawn[first : first + size]
            for row in self._denoise(batch, plan, embeds, timings):
                result, decoder = None, self._decoder
                if self.refiner is not None and row.index >= plan.table.num_rows:
                    decoder = self.refiner._decoder
                if row.index + 1 == num_rows:
                    decoded.append(
                        decoder.draw(
                            row.latents, may_be_plain=plan.upscaling is not None, timings=timings
                        )
                    )
                    latents.append(to_host(row.latents).copy())
                    if first + len(batch) == len(drawn):
                        pixels, depths, flags = zip(*decoded, strict=True)
                        pictures = np.concatenate(pixels)
                        if plan.upscaling is not None:
                            with timings.measure("join"):
                                pictures = plan.upscaling.join(to_host(pictures))
                        timings.add("total", start, clock())
                        result = Result(
                            request=request,
                            pixels=to_host(pictures),
                            device_pixels=pictures,
                            latents=np.concatenate(latents),
                            nsfw_content_detected=(
                                tuple(chain.from_iterable(flags)) if decoder.checks else None
                            ),
                            recipes=tuple(self._recipe(image, plan) for image in images),
                            timings=timings,
                            depth=None if depths[0] is None else np.concatenate(depths),
                        )
                yield Step(
                    index=(first // size) * num_rows + row.index,
                    num_steps=num_steps,
                    timestep=row.timestep,
                    first_image=first,
                    latents=row.latents,
                    decode_preview=partial(decoder.preview, row),
                    result=result,
                )

    def _denoise(
        self,
        batch: Sequence[ImageRequest],
        plan: Plan,
        embeds: Mapping[tuple[str | None, ...], tuple[PromptEmbeds, ...]],
        timings: Timings,
    ) -> Iterator[Row]:
        sources: list[Source] = []
        if plan.request.image is not None and not plan.task.reads_image:
            sources = [self._source(image, plan, timings) for image in batch]
        with timings.measure("noise"):
            noise = [plan.noise(image) for image in batch]
            start = begin(plan.task, noise, self.latents_shape, plan.table, sources=sources)
        rows = self._rows(start, noise, batch, plan, embeds, timings)
        if plan.refining is None or self.refiner is None:
            return rows
        return self.refiner._refine(rows, noise, batch, plan.refining, timings)

    def _source(self, image: ImageRequest, plan: Plan, timings: Timings) -> Source:
        """What a picture, or a tile of one that is made larger, starts from."""
        given, upscaling = plan.request, plan.upscaling
        if upscaling is None:
            return self._images.encode(
                plan.task, given.image, given.mask, given.depth_map, timings=timings
            )
        part = upscaling.part(image)
        if upscaling.level is not None:
            return noised(part, upscaling.level)
        picture = InputImage.of(part, name=f"a tile of {upscaling.image.name}")
        return self._images.encode(plan.task, picture, timings=timings)

    def _refine(
        self,
        rows: Iterator[Row],
        noise: Sequence[NoiseStream],
        batch: Sequence[ImageRequest],
        plan: Plan,
        timings: Timings,
    ) -> Iterator[Row]:
        """The base model's ``rows``, then this refiner's, which go on with the last one's latents.

        Random draws go on too, each picture's from its own stream.
        """
        for row in rows:
            yield row
        if not self.bundle.manifest.model.force_zeros_for_empty_prompt:
            batch = [i._replace(negative_prompt=i.negative_prompt or "") for i in batch]
        embeds = self._prompts.encode(
            [plan.texts(image) for image in batch],
            prompt_weighting=plan.request.prompt_weighting,
            timings=timings,
        )
        start = Start(row.latents)
        for refined in self._rows(start, noise, batch, plan, embeds, timings):
            yield replace(refined, index=row.index + 1 + refined.index)

    def _rows(
        self,
        start: Start,
        noise: Sequence[NoiseStream],
        batch: Sequence[ImageRequest],
        plan: Plan,
        embeds: Mapping[tuple[str | None, ...], tuple[PromptEmbeds, ...]],
        timings: Timings,
    ) -> Iterator[Row]:
        texts = [embeds[plan.texts(image)] for image in batch]
        prompts, negatives, concepts = (*zip(*texts, strict=True), (), ())[:3]
        safety = None
        if plan.safety is not None:
            beside = {"encoder_hidden_states": [text.prompt_embeds for text in concepts]}
            safety = Safety(plan.safety, {**beside, **pooled_inputs(concepts)})
        return denoise(
            self._engines["unet"],
            start.latents,
            prompt_embeds=[text.prompt_embeds for text in prompts],
            negative_prompt_embeds=[text.prompt_embeds for text in negatives],
            guidance_scale=plan.guidance_scale,
            guided_rows=plan.guided_rows,
            table=plan.table,
            noise=noise,
            timings=timings,
            unet_inputs={**plan.unet_inputs, **start.unet_inputs, **pooled_inputs(prompts)},
            negative_unet_inputs={**plan.negative_unet_inputs, **pooled_inputs(negatives)},
            known=start.known,
            unet_shallow=self._engines[SHALLOW] if plan.shallow_rows else None,
            shallow_rows=plan.shallow_rows,
            controlnets=self._controls.encode(plan.controls, timings=timings),
            safety=safety,
        )

    def _prompt_encoder(self) -> PromptEncoder:
        encoders = {name: (words, self._engines[name]) for name, words in self._tokenizers.items()}
        manifest = self.bundle.manifest
        return PromptEncoder(
            encoders,
            max_chunks=max_prompt_chunks(manifest),
            chunk_means=manifest.model.family == STABLE_DIFFUSION_XL,
        )

    def _recipe(self, image: ImageRequest, plan: Plan) -> Recipe:
        unet = self._engines["unet"].entry
        recipe = recipe_of(
            image,
            plan,
            self.bundle.manifest,
            backend=unet.backend,
            precision=unet.precision,
            loras=self.loras,
            fingerprint=self.fingerprint,
        )
        if self.refiner is None:
            return recipe
        model, fingerprint = self.refiner.bundle.manifest.model, self.refiner.fingerprint
        return replace(recipe, refiner=model.source, refiner_fingerprint=fingerprint)

    @property
    def engines(self) -> dict[str, EngineEntry]:
        """What the manifest says of the engine that each component runs on."""
        return {name: engine.entry for name, engine in self._engines.opened.items()}

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs that are on the engines."""
        return self._engines.loras

    @property
    def profile(self) -> Profile:
        """The shapes that the bundle was built for."""
        return self.bundle.manifest.profile

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """One picture's latents: channels, height, width."""
        return self.bundle.manifest.latents_shape

    def forget_prompts(self) -> None:
        """Encode the next request's inputs anew, as a first request does: for measurements."""
        self._prompts.forget()
        self._images.forget()
        self._reader.forget()
        self._controls.forget()
        if self.refiner is not None:
            self.refiner.forget_prompts()
        for other in self._others.values():
            other.forget_prompts()

    def close(self) -> None:
        """Free all engines, the refiner's too; the pipeline is of no use after it."""
        self._close_others()
        if self.refiner is not None:
            self.refiner.close()
        self._engines.close()

    def _close_others(self) -> None:
        for other in self._others.values():
            other._engines.close()  # their refiners are those of this one's
        self._others.clear()
