"""A plan to pictures, by the engines of one size: what is between a request and its rows."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.spec import STABLE_DIFFUSION_XL
from sd_runtime.arrays import to_host
from sd_runtime.conditioning import PromptEncoder, pooled_inputs
from sd_runtime.controlnet import ControlEncoder
from sd_runtime.decoder import Decoder
from sd_runtime.denoise import denoise
from sd_runtime.guidance import Safety
from sd_runtime.image_encoder import ImageEncoder
from sd_runtime.input_image import InputImage
from sd_runtime.picture_reader import PictureReader
from sd_runtime.plan import max_prompt_chunks
from sd_runtime.recipe import recipe_of
from sd_runtime.result import Result, Step
from sd_runtime.start import Start, begin
from sd_runtime.timing import Timings, clock_of
from sd_runtime.upscaling import noised
from sd_runtime.work_stream import finish

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sd_engines.engine import Array
    from sd_runtime.conditioning import Encoded
    from sd_runtime.decoder import Decoded
    from sd_runtime.denoise import Row
    from sd_runtime.engine_set import EngineSet
    from sd_runtime.image_encoder import Source
    from sd_runtime.noise import NoiseStream
    from sd_runtime.plan import Plan
    from sd_runtime.recipe import Recipe
    from sd_runtime.request import ImageRequest
    from sd_runtime.tokenizer import Tokenizer


class Painter:
    """Draws with ``engines``, whose owner closes them; ``refiner`` goes on with what it draws."""

    def __init__(
        self,
        engines: EngineSet,
        tokenizers: Mapping[str, Tokenizer],
        *,
        refiner: Painter | None = None,
    ) -> None:
        self.bundle = engines.bundle
        self._refiner = refiner
        self._engines = engines
        self._tokenizers = tokenizers
        self._prompts = self._prompt_encoder()
        self._decoder = Decoder(engines.__getitem__, self.bundle.manifest)
        self._images = ImageEncoder(engines.__getitem__, self.bundle.manifest.profile)
        self._reader = PictureReader(engines.__getitem__)
        self._controls = ControlEncoder(engines.__getitem__)

    def forget(self) -> None:
        """Encode the next inputs anew."""
        for encoder in (self._prompts, self._images, self._reader, self._controls):
            encoder.forget()

    def renew(self) -> None:
        """Read prompts by other engines than before: those that have other LoRAs on them."""
        self._prompts = self._prompt_encoder()

    def stream(self, plan: Plan) -> Generator[Step]:
        """Every UNet call of ``plan``, whose seeds are filled in; the last one has the result.

        Between two of them the caller's thread is on its own stream again.
        """
        with closing(self._steps(plan)) as steps:
            while True:
                with self._engines.stream:
                    step = next(steps, None)
                if step is None:
                    return
                yield step

    def _steps(self, plan: Plan) -> Generator[Step]:
        timings = Timings(clock_of(self._engines["unet"].entry))
        start = timings.now()
        request, num_rows = plan.request, plan.num_rows
        images = request.images()
        drawn = images if plan.upscaling is None else plan.upscaling.tiles_of(images)
        size = self.bundle.manifest.profile.batch_size
        texts = [plan.texts(image) for image in images]
        if plan.task.reads_image:
            embeds = self._reader.encode(request.image, texts, timings=timings)
        else:
            embeds = self._prompts.encode(
                texts, prompt_weighting=request.prompt_weighting, timings=timings
            )
        num_steps = plan.num_steps(size)
        latents: list[Array] = []
        decoded: list[Decoded] = []
        for first in range(0, len(drawn), size):
            batch = drawn[first : first + size]
            for row in self._denoise(batch, plan, embeds, timings):
                result, decoder = None, self._decoder
                if self._refiner is not None and row.index >= plan.table.num_rows:
                    decoder = self._refiner._decoder
                if row.index + 1 == num_rows:
                    is_tile = plan.upscaling is not None
                    decoded.append(decoder.draw(row.latents, may_be_plain=is_tile, timings=timings))
                    latents.append(to_host(row.latents).copy())
                    if first + len(batch) == len(drawn):
                        result = self._result(plan, decoded, latents, timings, start=start)
                yield Step(
                    index=(first // size) * num_rows + row.index,
                    num_steps=num_steps,
                    timestep=row.timestep,
                    first_image=first,
                    read_latents=partial(self._latents, row),
                    decode_preview=partial(self._preview, decoder, row),
                    result=result,
                )

    def _latents(self, row: Row) -> Array:
        finish(self._engines.stream)
        return row.latents

    def _preview(self, decoder: Decoder, row: Row) -> NDArray[np.uint8]:
        with self._engines.stream:
            return decoder.preview(row)

    def _result(
        self,
        plan: Plan,
        decoded: Sequence[Decoded],
        latents: Sequence[Array],
        timings: Timings,
        *,
        start: Any,
    ) -> Result:
        pixels, depths, flags = zip(*decoded, strict=True)
        pictures = np.concatenate(pixels)
        if plan.upscaling is not None:
            with timings.measure("join"):
                pictures = plan.upscaling.join(to_host(pictures))
        on_host = to_host(pictures)
        timings.add("total", start, timings.now())
        timings.settle()
        return Result(
            request=plan.request,
            pixels=on_host,
            device_pixels=pictures,
            latents=np.concatenate(latents),
            nsfw_content_detected=None if flags[0] is None else tuple(chain(*flags)),
            recipes=tuple(self._recipe(image, plan) for image in plan.request.images()),
            timings=timings,
            depth=None if depths[0] is None else np.concatenate(depths),
        )

    def _denoise(
        self,
        batch: Sequence[ImageRequest],
        plan: Plan,
        embeds: Encoded,
        timings: Timings,
    ) -> Iterator[Row]:
        sources: list[Source] = []
        if plan.request.image is not None and not plan.task.reads_image:
            sources = [self._source(image, plan, timings) for image in batch]
        with timings.measure("noise"):
            noise = [plan.noise(image) for image in batch]
            shape = self.bundle.manifest.latents_shape
            start = begin(plan.task, noise, shape, plan.table, sources=sources)
        rows = self._rows(start, noise, batch, plan, embeds, timings)
        if plan.refining is None or self._refiner is None:
            return rows
        return self._refiner._refine(rows, noise, batch, plan.refining, timings)

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
        embeds: Encoded,
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
            unet_shallow=self._engines["unet_shallow"] if plan.shallow_rows else None,
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
        return recipe_of(
            image,
            plan,
            self.bundle.manifest,
            backend=unet.backend,
            precision=unet.precision,
            loras=self._engines.loras,
            refiner=None if self._refiner is None else self._refiner.bundle.manifest,
        )
