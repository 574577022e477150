"""The torch modules of a latent upscaler that are traced: its text encoder and its UNet.

Stable Diffusion's x2 latent upscaler (Katherine Crowson, 2022) is a model of k-diffusion: its UNet
works on Karras' preconditioned input and output (arXiv:2206.00364, table 1), and is told of noise
by the logarithm of its level. What is the same in every program goes into the graph, so that it
predicts x₀ of a sample in the variance-preserving scale as any other UNet may.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sd_export.family import NOISE_LEVEL_WIDTH


class PoolingTextEncoder(nn.Module):
    """input_ids int64 [batch, 77] → prompt_embeds [batch, 77, d], pooled_prompt_embeds [batch, d].

    The last layer's, as they are; pooled are those of the text's end, normalised.
    """

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder: Any = text_encoder

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode."""
        found: list[torch.Tensor] = []
        norm = self.text_encoder.final_layer_norm
        hook = norm.register_forward_pre_hook(lambda _norm, inputs: found.append(inputs[0]))
        try:
            pooled_prompt_embeds: torch.Tensor = self.text_encoder(input_ids).pooler_output
        finally:
            hook.remove()
        return found[0], pooled_prompt_embeds


class LatentUpscaler(nn.Module):
    """sample [batch, c, h, w], timestep [batch], encoder_hidden_states, … → noise_pred: x₀.

    And low_res_latents [batch, c, h ÷ 2, w ÷ 2], pooled_prompt_embeds [batch, d]. The timestep is
    log(sigma ÷ alpha) ÷ 4 of the sample.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        for name, module in list(unet.named_modules()):
            if name.split(".")[-2:-1] in (["downsamplers"], ["upsamplers"]):
                unet.set_submodule(name, ByChannel(module, upward="upsamplers" in name))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        low_res_latents: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """Predict."""
        larger = functional.interpolate(low_res_latents, scale_factor=2, mode="nearest")
        half = pooled_prompt_embeds.shape[0], NOISE_LEVEL_WIDTH // 2
        no_noise = [pooled_prompt_embeds.new_ones(half), pooled_prompt_embeds.new_zeros(half)]
        output: torch.Tensor = self.unet(
            torch.cat([sample, larger], dim=1),
            timestep,
            encoder_hidden_states,
            timestep_cond=torch.cat([*no_noise, pooled_prompt_embeds], dim=1),
            return_dict=False,
        )[0]
        noise_to_signal = torch.exp(4 * timestep)[:, None, None, None]
        alpha = torch.rsqrt(noise_to_signal**2 + 1)
        sigma = noise_to_signal * alpha
        return alpha * sample + sigma * output[:, : sample.shape[1]]  # the last is a variance


class ByChannel(nn.Module):
    """A resampler of k-diffusion, each channel by itself.

    diffusers convolves with a kernel for every pair of channels, all zeros but for those of a
    channel with itself. The result is the same.
    """

    def __init__(self, resampler: nn.Module, *, upward: bool) -> None:
        super().__init__()
        self.resampler: Any = resampler
        self.upward = upward

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Make it twice, or half as large."""
        pad, mode, channels = self.resampler.pad, self.resampler.pad_mode, inputs.shape[1]
        kernel = self.resampler.kernel.to(inputs)[None, None].expand(channels, 1, -1, -1)
        if self.upward:
            inputs = functional.pad(inputs, ((pad + 1) // 2,) * 4, mode)
            return functional.conv_transpose2d(
                inputs, kernel, stride=2, padding=2 * pad + 1, groups=channels
            )
        inputs = functional.pad(inputs, (pad,) * 4, mode)
        return functional.conv2d(inputs, kernel, stride=2, groups=channels)
