"""Prompts to pictures: opens a bundle's engines once, then answers requests."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Final, Self

from sd_engines.bundle import Bundle
from sd_engines.closing import Closing
from sd_engines.engine import listed_engines
from sd_runtime.engine_set import EngineSet
from sd_runtime.engines import text_encoders
from sd_runtime.lora import Lora, find_loras
from sd_runtime.plan import plan
from sd_runtime.refiner import at_size_of
from sd_runtime.scheduler_check import drawable_bundle
from sd_runtime.tokenizer import Tokenizer
from sd_runtime.turns import Turns
from sd_runtime.work_stream import work_stream

if TYPE_CHECKING:
    import os
    from collections.abc import Generator, Mapping, Sequence

    from sd_engines.entries import EngineEntry
    from sd_engines.spec import Precision, Profile
    from sd_runtime.painter import Painter
    from sd_runtime.plan import Plan
    from sd_runtime.request import Request
    from sd_runtime.result import Result, Step
    from sd_runtime.work_stream import WorkStream

TOKENIZER_OF = {
    "text_encoder": "tokenizer/tokenizer.json",
    "text_encoder_2": "tokenizer_2/tokenizer.json",
}
_TO_DRAW: Final = ("sd_runtime.painter", "numpy.random", "PIL.PngImagePlugin")
"""Modules of the first picture that no engine waits for."""


class Pipeline(Closing):
    """A bundle ready to draw; a context manager that frees its engines.

    One request at a time, from any thread: `generate` and `use_loras` wait for what another thread
    generates.
    """

    def __init__(
        self,
        engines: EngineSet,
        tokenizers: Mapping[str, Tokenizer],
        *,
        refiner: Pipeline | None = None,
    ) -> None:
        from sd_runtime.painter import Painter

        self.bundle = engines.bundle
        self.refiner = refiner
        self._engines = engines
        self._others: dict[tuple[int, int], Pipeline] = {}
        self._tokenizers = dict(tokenizers)
        second = None if refiner is None else refiner._painter
        self._painter: Painter = Painter(engines, self._tokenizers, refiner=second)
        self._turns = Turns()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | Bundle,
        *,
        backend: str = "auto",
        threads: int | None = None,
        precision: Precision | None = None,
        request: Request | None = None,
        num_steps: int | None = None,
        loras: Sequence[str | Lora] = (),
        refiner: str | os.PathLike[str] | Bundle | None = None,
    ) -> Self:
        """Open the bundle at ``path`` and every engine that text-to-image needs.

        Or those of a `Bundle` that `drawable_bundle` opened.

        It draws the size of ``request`` or, without one, the bundle's own; engines of its other
        sizes are opened for the first request that asks for them, and kept.
        The VAE's encoder is opened for the first request that starts from a picture, and so is a
        depth estimator; the shallow UNet for the first with a cache_interval, a ControlNet for the
        first that it counts in.

        ``backend`` is one of the bundle's, or "auto" for the one whose UNet is fastest here, which
        is measured once and remembered (`sd_engines.choice`); ``threads`` bounds a CPU backend's.
        ``precision`` is the UNet's, where the bundle has more than one; None is never fp8 or int8
        unless there is nothing else.
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
        bundle = path if isinstance(path, Bundle) else drawable_bundle(path)
        found = find_loras(loras)
        second = refiner if isinstance(refiner, Bundle | None) else drawable_bundle(refiner)
        planned = None
        if request is not None:
            refining = None if second is None else second.manifest
            planned = plan(request, bundle.manifest, refiner=refining)
            size = planned.profile.height, planned.profile.width
            bundle = bundle.at(*size)
        if second is not None:
            second = replace(second, manifest=at_size_of(bundle.manifest, second.manifest))
        unets = listed_engines(bundle, "unet", backend=backend, precision=precision)
        stream = work_stream(unets)
        other = None
        if second is not None:
            other = cls._open(
                second,
                planned.refining if planned else None,
                backend=backend,
                threads=threads,
                num_steps=num_steps,
                stream=stream,
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
                stream=stream,
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
        stream: WorkStream,
    ) -> Self:
        max_tokens = bundle.manifest.model.max_prompt_tokens
        tokenizers: dict[str, Tokenizer] = {}
        files = {
            name: bundle.verified_path(TOKENIZER_OF[name])
            for name in text_encoders(bundle.manifest)
        }

        def while_engines_open() -> None:
            for name, file in files.items():
                tokenizers[name] = Tokenizer.load(file, max_tokens=max_tokens)
            for module in _TO_DRAW:
                import_module(module)

        engines = EngineSet.open(
            bundle,
            planned,
            backend=backend,
            threads=threads,
            precision=precision,
            num_steps=num_steps,
            loras=loras,
            stream=stream,
            meanwhile=while_engines_open,
        )
        return cls(engines, tokenizers, refiner=refiner)

    def use_loras(self, loras: Sequence[str | Lora]) -> None:
        """Put these LoRAs on the engines in place of those that are there; none takes them off.

        Where one is refused, everything stays as it is. Raises as `load`.
        """
        found = find_loras(loras)
        with self._turns.lock:
            self._close_others()
            self._engines.use_loras(found)
            self._painter.renew()
            self._turns.take()

    def generate(self, request: Request) -> Result:
        """Draw all pictures of ``request``.

        Raises `ConfigError` for what the bundle cannot do, `BackendError` where an engine fails
        or its output is no picture.
        """
        steps = self.stream(request)
        with self._turns.lock:
            for step in steps:
                if step.result is not None:
                    return step.result
        raise AssertionError("the last step holds the result")

    def stream(self, request: Request) -> Generator[Step]:
        """The same, step by step: for progress, previews, and cancelling by ``close()``.

        Once another request is begun, or other LoRAs are put on, its next step or preview is a
        `ConfigError`.
        """
        refiner = None if self.refiner is None else self.refiner.bundle.manifest
        planned = plan(request, self.bundle.manifest, refiner=refiner)
        return self._steps(replace(planned, request=planned.request.seeded()))

    def _steps(self, planned: Plan) -> Generator[Step]:
        with self._turns.lock:
            in_turn = partial(self._turns.run, self._turns.take())
            painter = self._at(planned.profile.height, planned.profile.width)._painter
        with closing(painter.stream(planned)) as steps:
            while step := in_turn(partial(next, steps, None)):
                yield replace(step, decode_preview=partial(in_turn, step.decode_preview))

    def _at(self, height: int, width: int) -> Pipeline:
        """The pipeline that draws this size: this one, or one beside it.

        That one runs the engines of this one where its graphs are the same.
        """
        size = height, width
        if size == (self.profile.height, self.profile.width):
            return self
        if size not in self._others:
            refiner = None if self.refiner is None else self.refiner._at(*size)
            engines = self._engines.at(self.bundle.at(*size))
            self._others[size] = type(self)(engines, self._tokenizers, refiner=refiner)
        return self._others[size]

    @property
    def fingerprint(self) -> str:
        """What identifies the bundle's model in recipes: `Manifest.fingerprint`."""
        return self.bundle.manifest.fingerprint

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
        self._painter.forget()
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
