"""What a UNet of Stable Diffusion XL is told besides the prompt, as diffusers' models take it.

Podell et al. 2023 (arXiv:2307.01952), section 2.2. What is made like the UNet, its shallow part and
ControlNets, takes the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_engines.spec import POOLED_PROMPT_EMBEDS, TIME_IDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


def added_cond_kwargs(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The pooled prompt and sizes among a graph's ``inputs`` by name; None where it takes none."""
    if TIME_IDS not in inputs:
        return None
    return {"text_embeds": inputs[POOLED_PROMPT_EMBEDS], "time_ids": inputs[TIME_IDS]}
