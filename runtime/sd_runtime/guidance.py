"""What becomes of the UNet's answers on a guided row: one model output.

Ho and Salimans 2022 (arXiv:2207.12598), and where a picture is to be led away from a concept
Schramowski et al. 2022 (arXiv:2211.05105), whose numbers of equations are meant below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from sd_runtime.arrays import elementwise

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sd_engines.engine import Array, Binding
    from sd_runtime.safety_options import SafetyConfig

KERNEL_SOURCE: Final = (
    "float32 uncond, float32 text, float32 guidance_scale",
    "float32 out",
    "out = uncond + guidance_scale * (text - uncond);",
)
"""CUDA C++ of one element of `guide`, as `elementwise` takes it."""


class Safety(NamedTuple):
    """How strongly to lead away from a concept, and what the UNet is told of it.

    ``unet_inputs`` are by name, [n, …], or [1, …] for all pictures.
    """

    config: SafetyConfig
    unet_inputs: Mapping[str, Sequence[Array] | Array]


class SafetyGuidance:
    """Leads n pictures away from a concept; remembers which way it led so far.

    ``binding`` is the UNet's, for n samples, bound to the concept. It runs by itself, after the two
    halves: a bundle's UNet takes twice its pictures at once, and not three times.
    """

    def __init__(self, config: SafetyConfig, binding: Binding) -> None:
        self._config = config
        self._binding = binding
        self._momentum = np.zeros_like(binding.outputs["noise_pred"])

    def run(self, sample: Array, timestep: float) -> None:
        """Ask the UNet what it sees of the concept in ``sample`` [n, c, h, w]."""
        self._binding.inputs["sample"][...] = sample
        self._binding.inputs["timestep"][...] = timestep
        self._binding.run()

    def correct(self, guidance: Array, *, text: Array, uncond: Array, row: int) -> None:
        """Take from ``guidance``, text − uncond, what leads to the concept; all [n, c, h, w]."""
        config, concept = self._config, self._binding.outputs["noise_pred"]
        difference = text - concept
        scale = np.minimum(np.abs(difference) * config.sld_guidance_scale, 1.0)  # 6
        scale *= difference < config.sld_threshold
        towards = (concept - uncond) * scale  # 4
        towards += config.sld_momentum_scale * self._momentum  # 7
        self._momentum *= config.sld_mom_beta  # 8
        self._momentum += (1 - config.sld_mom_beta) * towards
        if row >= config.sld_warmup_steps:
            guidance -= towards  # 3


def guide(
    noise_pred: Array,
    guidance_scale: float,
    *,
    out: Array,
    row: int,
    safety: SafetyGuidance | None,
) -> None:
    """Write uncond + guidance_scale · (text − uncond) to ``out`` [n, c, h, w].

    ``noise_pred`` [2n, c, h, w] is what the UNet answered, beside the negative prompt first.
    ``safety`` has run.
    """
    uncond, text = noise_pred[: len(out)], noise_pred[len(out) :]
    if safety is None and not isinstance(out, np.ndarray):
        elementwise(*KERNEL_SOURCE, "sd_guide")(uncond, text, guidance_scale, out)
        return
    np.subtract(text, uncond, out=out)
    if safety is not None:
        safety.correct(out, text=text, uncond=uncond, row=row)
    out *= guidance_scale
    out += uncond
