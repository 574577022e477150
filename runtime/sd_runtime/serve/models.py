"""The bundles behind a server, by the names that requests choose them by."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from sd_engines.closing import Closing
from sd_engines.errors import ConfigError
from sd_runtime.lora import find_loras
from sd_runtime.pipeline import Pipeline
from sd_runtime.refusal import RefusedError
from sd_runtime.scheduler_check import drawable_bundle
from sd_runtime.serve.offer import Offer, first_request, model_name
from sd_runtime.task import check_served

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sd_engines.bundle import Bundle
    from sd_engines.spec import Precision
    from sd_runtime.request import Request


@dataclass(frozen=True)
class Model:
    """One bundle: what a request may ask of it, and what draws it."""

    offer: Offer
    pipeline: Pipeline


class Models(Closing):
    """Bundles that are open together, from the start to the end; the first is the default.

    None is opened or closed meanwhile, so no request waits for that, and what fits into memory at
    the start fits for good.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = {model.offer.model: model for model in models}

    @classmethod
    def load(
        cls,
        bundles: Sequence[Path],
        *,
        backend: str = "auto",
        precision: Precision | None = None,
        threads: int | None = None,
        loras: Sequence[str] = (),
        max_images: int,
        max_steps: int,
    ) -> Self:
        """Open ``bundles``, each with ``loras`` on it, ready for their first requests.

        Raises as `check_bundles`, before an engine is opened, and as `Pipeline.load`.
        """
        checked = check_bundles(bundles, loras=loras)
        with ExitStack() as opened:
            models = []
            for bundle, request in checked:
                pipeline = opened.enter_context(
                    Pipeline.load(
                        bundle,
                        backend=backend,
                        precision=precision,
                        threads=threads,
                        request=request,
                        loras=loras,
                    )
                )
                offer = Offer.from_pipeline(pipeline, max_images=max_images, max_steps=max_steps)
                models.append(Model(offer, pipeline))
            opened.pop_all()
        return cls(models)

    def __iter__(self) -> Iterator[Model]:
        """In the order in which they were named."""
        return iter(self._models.values())

    @property
    def default(self) -> Model:
        """What draws a request that names none."""
        return next(iter(self))

    def find(self, name: str | None) -> Model:
        """The one of this name; `RefusedError` (404) where there is none."""
        if name is None:
            return self.default
        if name not in self._models:
            raise RefusedError(
                f"there is no model {name!r} here",
                f"Leave it out, or name one that is served: {', '.join(self._models)}.",
                status=404,
                code="model_not_found",
            )
        return self._models[name]

    def close(self) -> None:
        """Free all engines."""
        for model in self:
            model.pipeline.close()


def check_bundles(bundles: Sequence[Path], *, loras: Sequence[str]) -> list[tuple[Bundle, Request]]:
    """Each with what to make its engines ready for, from the manifests alone.

    Raises `BundleError` where one cannot be opened, `ConfigError` for one that services have no
    door for, two of one name, and a LoRA that is no file.
    """
    checked: list[tuple[Bundle, Request]] = []
    paths: dict[str, Path] = {}
    for path in bundles:
        bundle = drawable_bundle(path)
        check_served(bundle.manifest)
        name = model_name(path)
        if name in paths:
            raise ConfigError(
                f"two bundles are called {name}: {paths[name]} and {path}",
                "Rename one of the folders: requests choose a bundle by its name.",
            )
        paths[name] = path
        checked.append((bundle, first_request(bundle.manifest)))
    find_loras(loras)
    return checked
