"""The two parts of a ControlNet, as torch modules to trace.

Zhang et al. 2023, arXiv:2302.05543, section 3. Whatever a ControlNet says is the same in one graph
or in three; `sd_export.controlnet` says why it is three.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sd_export.added_conditions import added_cond_kwargs

if TYPE_CHECKING:
    from collections.abc import Sequence


class ControlEmbedding(nn.Module):
    """control_image [batch, H, W, 3] in 0 … 1 → control_embeds [batch, c, h, w]."""

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.embedding: nn.Module = controlnet.controlnet_cond_embedding
        self.flips = controlnet.config.controlnet_conditioning_channel_order == "bgr"

    def forward(self, control_image: torch.Tensor) -> torch.Tensor:
        """Embed."""
        pixels = control_image.permute(0, 3, 1, 2)
        control_embeds: torch.Tensor = self.embedding(pixels.flip(1) if self.flips else pixels)
        return control_embeds


class ControlNet(nn.Module):
    """sample, timestep, encoder_hidden_states, …, control_embeds, conditioning_scale → residuals.

    Takes what ``names`` say, in their order: of Stable Diffusion XL also pooled_prompt_embeds and
    time_ids. ``control_embeds`` are a `ControlEmbedding`'s; ``conditioning_scale`` [batch,
    residuals] is what each of the `residual_specs` is multiplied by.
    """

    def __init__(self, controlnet: Any, *, names: Sequence[str]) -> None:
        super().__init__()
        self.controlnet = copy(controlnet)  # what is changed here stays here
        self.controlnet._modules = dict(controlnet._modules)
        self.controlnet.controlnet_cond_embedding = nn.Identity()
        self.controlnet.register_to_config(controlnet_conditioning_channel_order="rgb")
        self.names = tuple(names)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Say what to add."""
        inputs = dict(zip(self.names, tensors, strict=True))
        down, mid = self.controlnet(
            inputs["sample"],
            inputs["timestep"],
            inputs["encoder_hidden_states"],
            controlnet_cond=inputs["control_embeds"],
            added_cond_kwargs=added_cond_kwargs(inputs),
            return_dict=False,
        )
        scales = inputs["conditioning_scale"]
        return tuple(
            residual * scales[:, index, None, None, None]
            for index, residual in enumerate((*down, mid))
        )
