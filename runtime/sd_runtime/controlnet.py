"""ControlNets at work: on which of a request's rows they run, and what they tell the UNet.

Zhang et al. 2023 (arXiv:2302.05543). Each looks at the latents as the UNet does, and at a picture;
what all of them say is added up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from sd_engines.errors import ConfigError
from sd_engines.spec import CONTROL_EMBEDDING, CONTROLNET, MID_RESIDUAL, RESIDUAL
from sd_runtime.arrays import copy_into, to_host
from sd_runtime.control_options import CONTROL_NUMBERS, numbers_each
from sd_runtime.recent import Recent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from sd_engines.engine import Binding, Engine
    from sd_engines.manifest import Manifest
    from sd_runtime.input_image import InputImage
    from sd_runtime.request import Request
    from sd_runtime.timing import Timings

_REVISION = re.compile(r"@[0-9a-f]{40}$")
"""What follows the id of a ControlNet of the Hub."""


@dataclass(frozen=True)
class Control:
    """One ControlNet of a request: the component, its picture, how much it counts and when.

    ``rows`` are those that it runs on. In ``guess_mode`` it counts more the deeper it is, and only
    where the prompt is seen.
    """

    component: str
    image: InputImage
    scale: float
    rows: frozenset[int]
    guess_mode: bool

    @property
    def embedding(self) -> str:
        """The component that looks at the picture."""
        return self.component.replace(CONTROLNET, CONTROL_EMBEDDING)


@dataclass(frozen=True)
class ControlNet:
    """A `Control` ready to run; ``embeds`` [1, c, h, w] are what was seen in its picture."""

    control: Control
    engine: Engine
    embeds: NDArray[np.float32]

    def conditioning_scale(self, *, negative: bool) -> NDArray[np.float32]:
        """What the residuals beside a prompt are multiplied by, float32 [1, residuals]."""
        num_residuals = len(self.engine.outputs)
        if not self.control.guess_mode:
            return np.full((1, num_residuals), self.control.scale, np.float32)
        if negative:
            return np.zeros((1, num_residuals), np.float32)
        deeper = np.logspace(-1, 0, num_residuals).astype(np.float32)[None]
        return deeper * np.float32(self.control.scale)


class ControlEncoder:
    """Looks at control pictures; remembers the last four (of 64×64 latents 5 MiB each).

    ``engine`` opens a component's engine, or gives the one that is open.
    """

    def __init__(self, engine: Callable[[str], Engine]) -> None:
        self._engine = engine
        self._known: Recent[tuple[str, str], NDArray[np.float32]] = Recent(4)

    def encode(self, controls: Sequence[Control], *, timings: Timings) -> list[ControlNet]:
        """Make ``controls`` ready to run; raises what opening an engine raises."""
        ready = []
        for control in controls:
            key = control.embedding, control.image.sha256
            embeds = self._known.get(key, partial(self._embeds, control, timings))
            ready.append(ControlNet(control, self._engine(control.component), embeds))
        self._known.trim()
        return ready

    def forget(self) -> None:
        """Drop all that is kept."""
        self._known.clear()

    def _embeds(self, control: Control, timings: Timings) -> NDArray[np.float32]:
        with timings.measure("load"):
            engine = self._engine(control.embedding)
            self._engine(control.component)  # what comes next: opened here, where it counts as load
        with timings.measure("control_embedding"):
            binding = engine.bind(1)
            height, width = (int(size) for size in engine.inputs["control_image"].shape[1:3])
            pixels = np.divide(control.image.pixels(height, width), 255, dtype=np.float32)
            copy_into(binding.inputs["control_image"], pixels[None])
            binding.run()
            return to_host(binding.outputs["control_embeds"]).copy()


def controlnet_names(manifest: Manifest) -> tuple[str, ...]:
    """What people call the ControlNets of a bundle, in their order, each by a name of its own.

    The last part of where it is from, or ``controlnet_0``, … where the bundle does not say or two
    would be called alike.
    """
    components = [name for name in manifest.components if name.startswith(CONTROLNET)]
    sources = [_REVISION.sub("", source) for source in manifest.model.controlnets]
    names = [PurePath(source).name for source in sources]
    if len(names) != len(components):
        return tuple(components)
    return tuple(
        name if name and names.count(name) == 1 else component
        for name, component in zip(names, components, strict=True)
    )


def controls_of(
    request: Request, manifest: Manifest, num_rows: int, *, of_rows: int
) -> tuple[Control, ...]:
    """The ControlNets of a bundle that ``request`` runs, on which of ``num_rows`` UNet calls.

    One runs on the rows that lie wholly between its start and its end, both shares of all
    ``of_rows``, those of a refiner among them, as diffusers counts; one of scale 0 on none, and is
    left out. Raises `ConfigError` where pictures and ControlNets are not as many.
    """
    images = request.control_image
    if images is None:
        return ()
    names = [name for name in manifest.components if name.startswith(CONTROLNET)]
    if not names:
        raise ConfigError(
            "a control picture, and the bundle has no ControlNet",
            "Export another bundle: "
            f"sd-export --model {manifest.model.source} --controlnet CONTROLNET --output BUNDLE.",
        )
    if len(images) != len(names):
        raise ConfigError(
            f"{len(images)} control pictures for the {len(names)} ControlNets of the bundle: "
            f"{', '.join(controlnet_names(manifest))}",
            "Give a --control-image for each, in this order; a scale of 0 in "
            "--controlnet-conditioning-scale leaves one out.",
        )
    given = (getattr(request, name) for name in CONTROL_NUMBERS)
    scales, starts, ends = (numbers_each(value, len(names)) for value in given)
    rows = frozenset(range(num_rows))
    controls = [
        Control(name, image, scale, rows & _rows_between(start, end, of_rows), request.guess_mode)
        for name, image, scale, start, end in zip(names, images, scales, starts, ends, strict=True)
    ]
    return tuple(control for control in controls if control.scale and control.rows)


class Residuals:
    """What the UNet's ``binding`` is given besides, row by row; zeros where no ControlNet runs.

    ``controlnets`` are each bound for the same samples, and all that holds for every row is set.
    """

    def __init__(self, binding: Binding, controlnets: Sequence[tuple[ControlNet, Binding]]) -> None:
        self._unet_inputs = binding.inputs
        self._controlnets = controlnets
        self._names = [n for n in binding.inputs if n.startswith((RESIDUAL, MID_RESIDUAL))]
        self._clear()

    def update(self, row: int) -> bool:
        """Run what runs on ``row``, on the UNet's own sample and timestep; whether anything did."""
        running = [binding for net, binding in self._controlnets if row in net.control.rows]
        for number, binding in enumerate(running):
            for name in ("sample", "timestep"):
                binding.inputs[name][...] = self._unet_inputs[name]
            binding.run()
            for name in self._names:
                if number == 0:
                    self._unet_inputs[name][...] = binding.outputs[name]
                else:
                    self._unet_inputs[name][...] += binding.outputs[name]
        if running:
            self._is_clear = False
        elif not self._is_clear:
            self._clear()
        return bool(running)

    def _clear(self) -> None:
        for name in self._names:
            self._unet_inputs[name][...] = 0
        self._is_clear = True


def _rows_between(start: float, end: float, num_rows: int) -> frozenset[int]:
    return frozenset(
        row for row in range(num_rows) if not (row / num_rows < start or (row + 1) / num_rows > end)
    )
