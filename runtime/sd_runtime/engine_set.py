"""The engines of one size of a bundle: who opens them, who shares them, and who closes them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from sd_engines.border import closed_error
from sd_engines.closing import Closing
from sd_engines.engine import open_engine
from sd_runtime.engines import components_to_open, first_batches, open_engines
from sd_runtime.lora import OWNERS, check_unchanged, fused_weights
from sd_runtime.work_stream import NO_STREAM

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from sd_engines.bundle import Bundle
    from sd_engines.engine import Engine
    from sd_engines.entries import EngineEntry
    from sd_engines.spec import Precision
    from sd_runtime.lora import Lora
    from sd_runtime.plan import Plan
    from sd_runtime.work_stream import WorkStream


class EngineSet(Closing):
    """Engines by component: those of every picture from the start, the others when first wanted.

    ``backend`` and ``threads`` are what the others open with, as `open_engine` takes them, and
    ``loras`` are put on them. ``borrowed`` names those that another set closes. ``stream`` is where
    they all are opened and run: `work_stream`.
    """

    def __init__(
        self,
        bundle: Bundle,
        opened: Mapping[str, Engine],
        *,
        backend: str = "auto",
        threads: int | None = None,
        loras: Sequence[Lora] = (),
        borrowed: Collection[str] = (),
        stream: WorkStream = NO_STREAM,
    ) -> None:
        self.bundle = bundle
        self.stream = stream
        self.opened = dict(opened)
        self.loras = tuple(loras)
        self._backend, self._threads = backend, threads
        self._borrowed = frozenset(borrowed)
        self._closed = False

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        planned: Plan | None = None,
        *,
        backend: str = "auto",
        threads: int | None = None,
        precision: Precision | None = None,
        num_steps: int | None = None,
        loras: Sequence[Lora] = (),
        stream: WorkStream = NO_STREAM,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Self:
        """Open what every picture of ``bundle`` needs, and what the first ones of ``planned`` do.

        ``num_steps`` and ``meanwhile`` as in `open_engines`. Raises as `open_engines`.
        """
        batches = {} if planned is None else first_batches(planned, bundle.manifest)
        opened = open_engines(
            bundle,
            components_to_open(bundle, batches),
            backend=backend,
            threads=threads,
            precision=precision,
            num_steps=num_steps,
            batches=batches,
            loras=loras,
            stream=stream,
            meanwhile=meanwhile,
        )
        return cls(bundle, opened, backend=backend, threads=threads, loras=loras, stream=stream)

    def __getitem__(self, component: str) -> Engine:
        """The engine of ``component``: one not open yet opens on the UNet's backend, if it can."""
        if component not in self.opened:
            unet = self.opened["unet"].entry
            if component in OWNERS:
                check_unchanged(self.loras)
            self.opened[component] = self._open(component, self.loras, prefer=unet)
        return self.opened[component]

    def at(self, bundle: Bundle) -> Self:
        """A set for another size of the same ``bundle``, on the backend of this one's UNet.

        It borrows the engines of this one whose graphs are the same.
        """
        self._check_open()
        graphs, ours = bundle.manifest.components, self.bundle.manifest.components
        shared = {n: e for n, e in self.opened.items() if graphs[n] == ours[n]}
        unet = self.opened["unet"].entry
        check_unchanged(self.loras)
        opened = open_engines(
            bundle,
            [name for name in components_to_open(bundle, {}) if name not in shared],
            backend=unet.backend,
            threads=self._threads,
            precision=unet.precision,
            batches={},
            loras=self.loras,
            stream=self.stream,
        )
        return type(self)(
            bundle,
            {**shared, **opened},
            backend=self._backend,
            threads=self._threads,
            loras=self.loras,
            borrowed=shared,
            stream=self.stream,
        )

    def use_loras(self, loras: Sequence[Lora]) -> None:
        """Put ``loras`` on the engines in place of those that are there.

        The engines that LoRAs change are opened anew, before the old ones are closed: where a LoRA
        is refused, everything stays as it is. Raises as `open_engine` and `fused_weights`.
        """
        with ExitStack() as opening:
            changed = {
                name: opening.enter_context(
                    self._open(name, loras, prefer=engine.entry, precision=engine.entry.precision)
                )
                for name, engine in self.opened.items()
                if name in OWNERS
            }
            opening.pop_all()
        for name, engine in changed.items():
            self.opened[name].close()
            self.opened[name] = engine
        self.loras = tuple(loras)

    def _open(
        self,
        component: str,
        loras: Sequence[Lora],
        *,
        prefer: EngineEntry,
        precision: Precision | None = None,
    ) -> Engine:
        self._check_open()
        weights = fused_weights(self.bundle, component, loras)
        with self.stream:
            return open_engine(
                self.bundle,
                component,
                backend=self._backend,
                threads=self._threads,
                precision=precision,
                prefer=prefer,
                weights=weights,
            )

    def close(self) -> None:
        """Free the engines that this set opened; it opens no others after it."""
        self._closed = True
        for name, engine in self.opened.items():
            if name not in self._borrowed:
                engine.close()

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error()
