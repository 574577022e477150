"""What an engine in 8 bits is calibrated on: the UNet's own inputs, while it draws pictures.

Ranges of activations cannot be told from noise: they grow and shrink along a trajectory, and with
what the prompt asks for. So the bundle's own graphs draw, in the loop that draws every picture.
One picture more is drawn and not calibrated on: what the engine is then held to.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from sd_engines.engine import build_engine, load_engine
from sd_export.memory import release
from sd_export.verify import Proof
from sd_runtime.conditioning import PromptEncoder, pooled_inputs
from sd_runtime.denoise import denoise
from sd_runtime.engines import text_encoders
from sd_runtime.pipeline import TOKENIZER_OF
from sd_runtime.plan import Plan, max_prompt_chunks, plan
from sd_runtime.request import ImageRequest, Request
from sd_runtime.start import begin
from sd_runtime.timing import Timings
from sd_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from sd_engines.engine import Engine
    from sd_engines.manifest import Manifest
    from sd_engines.spec import Precision
    from sd_runtime.conditioning import Encoded, Texts

PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "portrait of an old woman with a red scarf, oil painting",
    "a city street at night, neon lights in the rain",
    "a bowl of fruit on a wooden table, soft light",
    "aerial view of a lake between mountains",
    "a small robot in a garden, cartoon",
    "abstract pattern of gold on deep blue",
    "an old bicycle against a brick wall, black and white",
)
"""Of every kind: photographs and paintings, people and places, light and dark."""
_HELD_OUT = "a red circle on a white background"
_STEPS = 8
"""At most; a checkpoint that takes fewer by default is asked for those."""
_KEPT = 3
"""About so many steps of a picture are kept, others in each: more pictures tell more than more
steps of one, and each step kept is run again and again."""
_GUIDANCE_SCALE = 3.0
"""At most. What overshoots at more guidance widens all ranges, and costs digits at any: 7.1e-2
instead of 3.0e-2 for the shipped checkpoint, asked with 7.5."""
_SEED = 20_220_822
_DRAWN_BY: Final[Mapping[Precision | None, str]] = {"int8": "openvino", "fp8": "onnxruntime"}
"""OpenVINO for its own engines, the faster of those that run on a processor; ONNX Runtime, which
every export has, for TensorRT's."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A bundle to draw with, and what. ``folder`` holds its graphs, sealed or not yet.

    ``manifest`` lists at least the text encoders and the UNet among its components.
    """

    folder: Path
    manifest: Manifest
    prompts: tuple[str, ...]
    backend: str

    @classmethod
    def of(
        cls,
        folder: Path,
        manifest: Manifest,
        prompts: Sequence[str] | None,
        *,
        backend: str = "openvino",
    ) -> Self:
        """By a bundle's graphs; ``prompts`` None takes `PROMPTS`. ``backend`` is what draws."""
        prompts = tuple(prompts or PROMPTS)
        return cls(folder=folder, manifest=manifest, prompts=prompts, backend=backend)

    @property
    def digest(self) -> str:
        """SHA-256 over all that decides the inputs, but for the graphs."""
        model = self.manifest.model
        made_of = [
            *(self.prompts, _HELD_OUT, _STEPS, _KEPT, _GUIDANCE_SCALE, _SEED),
            *(model.scheduler, asdict(model.defaults)),
        ]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def draw(self) -> tuple[list[dict[str, np.ndarray]], Proof]:
        """The UNet's inputs by name, on steps spread over one picture a prompt, guided or not.

        And those on all steps of a picture that no prompt asked for, with what the UNet gave for
        them. `BackendError` where the backend does not run the graphs.
        """
        defaults = self.manifest.model.defaults
        planned = plan(
            Request(
                "",
                num_inference_steps=min(_STEPS, defaults.num_inference_steps),
                guidance_scale=min(_GUIDANCE_SCALE, defaults.guidance_scale),
            ),
            self.manifest,
        )
        *calibrating, held_out = (
            ImageRequest(prompt, planned.request.negative_prompts[0], _SEED + index)
            for index, prompt in enumerate((*self.prompts, _HELD_OUT))
        )
        embeds = self._embeds([planned.texts(image) for image in (*calibrating, held_out)])
        every = max(1, planned.table.num_rows // _KEPT)
        with self._engine("unet") as unet:
            draw = partial(_draw, unet, planned, embeds, self.manifest.latents_shape)
            inputs = [
                seen
                for index, image in enumerate(calibrating)
                for row, (seen, _) in enumerate(draw(image))
                if (row + index) % every == 0
            ]
            steps = list(draw(held_out))
            ran = f"{unet.entry.precision}, {self.backend} {unet.entry.version}"
        release()
        return inputs, Proof(
            inputs={n: np.concatenate([seen[n] for seen, _ in steps]) for n in steps[0][0]},
            reference={"noise_pred": np.concatenate([noise_pred for _, noise_pred in steps])},
            reference_name=f"the bundle's ONNX, {ran}, along a picture",
        )

    def _embeds(self, texts: Sequence[Texts]) -> Encoded:
        """What is read for each picture, encoded."""
        with ExitStack() as opened:
            encoders = {
                name: (
                    Tokenizer.load(
                        self.folder / TOKENIZER_OF[name],
                        max_tokens=self.manifest.model.max_prompt_tokens,
                    ),
                    opened.enter_context(self._engine(name)),
                )
                for name in text_encoders(self.manifest)
            }
            encoder = PromptEncoder(encoders, max_chunks=max_prompt_chunks(self.manifest))
            embeds = encoder.encode(texts, timings=Timings())
        release()
        return embeds

    def _engine(self, component: str) -> Engine:
        entry, profile = self.manifest.components[component], self.manifest.profile
        engine = build_engine(
            self.backend,
            self.folder / entry.file,
            output_dir=self.folder,
            component=component,
            entry=entry,
            profile=profile,
        )
        return load_engine(
            self.folder / engine.file,
            component=entry,
            engine=engine,
            max_batch=profile.max_batch(component, entry.inputs),
        )


def calibration_for(
    precision: Precision | None,
    folder: Path,
    manifest: Manifest,
    prompts: Sequence[str] | None,
) -> Calibration | None:
    """What an engine in ``precision`` is calibrated on, `Calibration.of`; None where on nothing."""
    backend = _DRAWN_BY.get(precision)
    if backend is None:
        return None
    return Calibration.of(folder, manifest, prompts, backend=backend)


def _draw(
    unet: Engine,
    planned: Plan,
    embeds: Encoded,
    shape: tuple[int, ...],
    image: ImageRequest,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Draw one picture; on each step what the UNet was given by name, and its noise_pred."""
    texts = embeds[planned.texts(image)]
    prompts, negatives = texts[:1], texts[1:]
    binding = unet.bind(len(texts), pictures=1)  # the one that the loop writes to
    noise = [planned.noise(image)]
    for _ in denoise(
        unet,
        begin(planned.task, noise, shape, planned.table).latents,
        prompt_embeds=[text.prompt_embeds for text in prompts],
        negative_prompt_embeds=[text.prompt_embeds for text in negatives],
        guidance_scale=planned.guidance_scale,
        guided_rows=planned.guided_rows,
        table=planned.table,
        noise=noise,
        timings=Timings(),
        unet_inputs={**planned.unet_inputs, **pooled_inputs(prompts)},
        negative_unet_inputs={**planned.negative_unet_inputs, **pooled_inputs(negatives)},
    ):
        seen = {name: array.copy() for name, array in binding.inputs.items()}
        yield seen, binding.outputs["noise_pred"].copy()
