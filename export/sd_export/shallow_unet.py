"""The UNet cut in two for feature caching: the shallow part, and what it reads of the deep one.

DeepCache (Ma et al., CVPR 2024, arXiv 2312.00858): from step to step the deep layers' features
hardly change, so most steps run the shallow part alone, on the features of an earlier step. The cut
is the paper's branch 0: deep features are what enters the last layer of the last up block.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sd_engines.errors import ExportError
from sd_export.added_conditions import added_cond_kwargs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_READS_TEXT = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
"""Last up blocks that can be cut, and whether their layers look at the prompt."""


def reads_text(unet_config: Mapping[str, Any]) -> bool:
    """Whether the shallow part takes encoder_hidden_states; `ExportError` where there is no cut."""
    block = unet_config.get("up_block_types", ("CrossAttnUpBlock2D",))[-1]
    problem = None
    if block not in _READS_TEXT:
        problem = f"a UNet that ends in a {block} cannot be cut for feature caching"
    elif unet_config.get("time_cond_proj_dim"):
        problem = "a UNet that is told its guidance draws in too few steps for feature caching"
    elif unet_config.get("in_channels", 4) != unet_config.get("out_channels", 4):
        problem = "a UNet that sees more than latents is not cut for feature caching"
    if problem is not None:
        raise ExportError(
            problem,
            "Export it without --feature-cache.",
            component="unet_shallow",
            stage="load",
        )
    return _READS_TEXT[block]


class CachedUnet(nn.Module):
    """What ``wrapped`` takes, which is a module around ``unet`` → noise_pred, deep_features.

    ``deep_features`` [batch, block_out_channels[0], h, w] are on the way to noise_pred anyway.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped: Any = wrapped

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict."""
        found: list[torch.Tensor] = []
        with _deep_features(self.wrapped.unet, found.append):
            noise_pred = self.wrapped(*tensors)
        return noise_pred, found[0]


class ShallowUnet(nn.Module):
    """sample, timestep, deep_features (, encoder_hidden_states, …) → noise_pred.

    Takes what ``names`` say, in their order: the prompt where the last up block looks at it, and of
    Stable Diffusion XL pooled_prompt_embeds and time_ids. The last layer's skip connection is
    conv_in's output, so no layer of a down block is needed. Keeps nothing of the deep part.
    """

    def __init__(self, unet: nn.Module, *, names: Sequence[str]) -> None:
        super().__init__()
        whole: Any = unet
        block = whole.up_blocks[-1]
        self.names = tuple(names)
        self.time_proj, self.time_embedding = whole.time_proj, whole.time_embedding
        if whole.config.addition_embed_type:
            self.add_time_proj, self.add_embedding = whole.add_time_proj, whole.add_embedding
        self.conv_in = whole.conv_in
        self.resnet = block.resnets[-1]
        self.attention = block.attentions[-1] if reads_text(whole.config) else None
        self.conv_norm_out, self.conv_act = whole.conv_norm_out, whole.conv_act
        self.conv_out = whole.conv_out

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Predict."""
        inputs = dict(zip(self.names, tensors, strict=True))
        sample = inputs["sample"]
        time_embeds = self.time_embedding(self.time_proj(inputs["timestep"]).to(sample.dtype))
        added = added_cond_kwargs(inputs)
        if added is not None:
            sizes = self.add_time_proj(added["time_ids"].flatten()).to(sample.dtype)
            sizes = sizes.reshape(sample.shape[0], -1)
            time_embeds = time_embeds + self.add_embedding(
                torch.cat([added["text_embeds"], sizes], dim=-1)
            )
        hidden_states = torch.cat([inputs["deep_features"], self.conv_in(sample)], dim=1)
        hidden_states = self.resnet(hidden_states, time_embeds)
        if self.attention is not None:
            prompt = inputs["encoder_hidden_states"]
            hidden_states = self.attention(hidden_states, prompt, return_dict=False)[0]
        noise_pred: torch.Tensor = self.conv_out(self.conv_act(self.conv_norm_out(hidden_states)))
        return noise_pred


def shallow_reference(unet: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What diffusers' own UNet gives where deep_features take the place of its own.

    ``inputs`` are a `ShallowUnet`'s by name. All of it runs. Without encoder_hidden_states its deep
    part sees noise for a prompt.
    """
    sample, prompt = inputs["sample"], inputs.get("encoder_hidden_states")
    if prompt is None:
        prompt = torch.randn(len(sample), 77, unet.config.cross_attention_dim)
    with _deep_features(unet, lambda _: inputs["deep_features"]):
        noise_pred: torch.Tensor = unet(
            sample, inputs["timestep"], prompt, added_cond_kwargs=added_cond_kwargs(inputs)
        ).sample
    return noise_pred


@contextmanager
def _deep_features(unet: Any, see: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Show ``see`` the deep features whenever ``unet`` makes them, and take what it gives for them.

    ``see`` gives None to leave them as they are.
    """
    block = unet.up_blocks[-1]
    layers = block.attentions if reads_text(unet.config) else block.resnets

    def on_output(_module: nn.Module, _inputs: object, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return see(output)
        given = see(output[0])
        return None if given is None else (given,)

    hook = layers[-2].register_forward_hook(on_output)
    try:
        yield
    finally:
        hook.remove()
