"""What a model, its tensors and its fixed shapes are: frozen dataclasses, pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

Precision: TypeAlias = Literal["fp32", "fp16", "bf16", "int8"]
"""What an engine computes in. int8: 8-bit weights and activations in products and convolutions,
the rest in more; a graph of a component is never in it."""
BATCH = "batch"
"""The one symbolic axis of every graph; all other axes are fixed by the profile."""
TIMESTEP_COND = "timestep_cond"
"""Input of a UNet that was distilled together with its guidance, and is told its scale there."""
CONTROLNET = "controlnet_"
CONTROL_EMBEDDING = "control_embedding_"
"""What the names of ControlNets begin with, ``controlnet_0``, …, and of what looks at the picture
for each, ``control_embedding_0``, …."""
RESIDUAL, MID_RESIDUAL = "down_block_additional_residual_", "mid_block_additional_residual"
"""Outputs of a ControlNet (the first with a number) and, added up, inputs of its UNet."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and shape of a graph's input or output.

    Axis 0 is `BATCH` wherever it counts pictures or prompts; its upper bound is
    `Profile.max_batch` of the component. All other axes are integers.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Profile:
    """The shapes a bundle is built for: pictures per call, and their size in pixels."""

    batch_size: int
    height: int
    width: int
    vae_scale_factor: int

    @property
    def latent_height(self) -> int:
        """Rows of the latents."""
        return self.height // self.vae_scale_factor

    @property
    def latent_width(self) -> int:
        """Columns of the latents."""
        return self.width // self.vae_scale_factor

    def max_batch(self, component: str, inputs: Iterable[TensorSpec]) -> int:
        """Largest axis 0: guidance doubles what the text encoder, UNet and ControlNets see.

        Not so for a UNet that takes `TIMESTEP_COND` among its ``inputs``: it is never guided.
        """
        guided = component in ("text_encoder", "unet", "unet_shallow")
        guided = guided or component.startswith(CONTROLNET)
        guided = guided and all(spec.name != TIMESTEP_COND for spec in inputs)
        return self.batch_size * (2 if guided else 1)


@dataclass(frozen=True)
class Defaults:
    """What a request takes where it says nothing."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5


@dataclass(frozen=True)
class ModelSpec:
    """What the runtime must know of the checkpoint, whatever the backend."""

    source: str
    revision: str | None
    family: str
    license: str | None
    prediction_type: str
    latent_channels: int
    vae_scaling_factor: float
    max_prompt_tokens: int
    scheduler: dict[str, Any]
    defaults: Defaults = Defaults()
    vae: str | None = None
    """Hub id or path of the VAE, where it is not the checkpoint's own."""
