"""DeepCache as an oracle: hooks on a diffusers UNet that keep what enters its last layer."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def deep_features_kept(unet: Any, *, interval: int) -> Iterator[list[bool]]:
    """Let the last layer of ``unet`` see an earlier call's features, every ``interval``-th its own.

    The whole UNet still runs. A batch of another size than the last one starts anew. Gives a list
    that says of each call so far whether it saw its own features.
    """
    width = unet.config.block_out_channels[0]
    kept: list[torch.Tensor] = []
    own: list[bool] = []

    def before(_layer: object, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_states, *others = inputs  # [batch, 2·width, h, w]: the features, then the skip
        features, skip = hidden_states[:, :width], hidden_states[:, width:]
        age = own[::-1].index(True) + 1 if own else interval
        own.append(age >= interval or len(kept[-1]) != len(features))
        if own[-1]:
            kept.append(features.clone())
        return torch.cat([kept[-1], skip], dim=1), *others

    hook = unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(before)
    try:
        yield own
    finally:
        hook.remove()
