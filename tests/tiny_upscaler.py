"""Tiny random upscalers, made of the unmodified classes of their authors.

As `tiny`'s of Stable Diffusion 2, with what stabilityai/stable-diffusion-x4-upscaler made
otherwise: the UNet's channels, class labels and order of blocks, a VAE of factor 4, two schedulers.
Latents are 8×8, so pictures of 8×8 become 32×32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm3d import make_ldm3d_checkpoint
from tiny import change_json, make_checkpoint, seeded

if TYPE_CHECKING:
    from pathlib import Path

_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}


def make_upscaler(folder: Path, *, seed: int = 0) -> Path:
    """Save a random upscaler in the diffusers layout under ``folder`` and return ``folder``."""
    import diffusers

    make_checkpoint(
        folder,
        seed=seed,
        v2=True,
        prediction_type="v_prediction",
        scheduler="DDIMScheduler",
        scheduler_options={"clip_sample": False, "set_alpha_to_one": False},
        block_out_channels=(8,),
        vae_block_out_channels=(8, 8, 8),
        cross_attention_dim=8,
        attention_heads=2,
        text_layers=1,
        norm_num_groups=4,
    )
    with seeded(seed + 1):
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=7,
            num_class_embeds=1000,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            only_cross_attention=(True,),
            cross_attention_dim=8,
            attention_head_dim=4,
            use_linear_projection=True,
            norm_num_groups=4,
        )
    unet.save_pretrained(folder / "unet")
    diffusers.DDPMScheduler(**_BETAS).save_pretrained(folder / "low_res_scheduler")
    change_json(folder / "scheduler/scheduler_config.json", **_BETAS)
    change_json(folder / "vae/config.json", scaling_factor=0.08333)
    return _named(folder, "StableDiffusionUpscalePipeline")


def make_latent_upscaler(folder: Path, *, seed: int = 0) -> Path:
    """The same as stabilityai/sd-x2-latent-upscaler; pictures of 8×8 become 16×16."""
    import diffusers

    make_checkpoint(
        folder,
        seed=seed,
        scheduler="EulerDiscreteScheduler",
        block_out_channels=(8,),
        vae_block_out_channels=(8, 8),
        cross_attention_dim=8,
        attention_heads=2,
        text_layers=1,
        norm_num_groups=4,
    )
    with seeded(seed + 1):
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=5,
            block_out_channels=(32, 64, 64),  # the deepest two are twice the first
            layers_per_block=1,
            down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 2),
            mid_block_type=None,
            up_block_types=(*["KCrossAttnUpBlock2D"] * 2, "KUpBlock2D"),
            act_fn="gelu",
            attention_head_dim=8,
            conv_in_kernel=1,
            conv_out_kernel=1,
            cross_attention_dim=8,
            cross_attention_norm="layer_norm",
            norm_num_groups=None,
            resnet_time_scale_shift="scale_shift",
            time_cond_proj_dim=128 + 8,
            time_embedding_type="fourier",
            timestep_post_act="gelu",
        )
    unet.save_pretrained(folder / "unet")
    change_json(folder / "scheduler/scheduler_config.json", prediction_type="original_sample")
    change_json(
        folder / "model_index.json",
        *("feature_extractor", "safety_checker", "requires_safety_checker"),
        _class_name="StableDiffusionLatentUpscalePipeline",
    )
    return folder


def make_ldm3d_upscaler(folder: Path, *, seed: int = 0) -> Path:
    """The same as Intel/ldm3d-sr: its VAE, of factor 2, takes and paints depth beside pictures.

    Its scheduler begins at timestep 0, which its pipeline does not correct, as many others do.
    """
    import diffusers

    make_ldm3d_checkpoint(
        folder,
        channels=4,
        seed=seed,
        scheduler="DDIMScheduler",
        scheduler_options={"clip_sample": False, "set_alpha_to_one": False},
        block_out_channels=(8,),
        vae_block_out_channels=(8, 8),
        cross_attention_dim=8,
        attention_heads=2,
        text_layers=1,
        norm_num_groups=4,
    )
    with seeded(seed + 1):
        unet = diffusers.UNet2DConditionModel.from_config(
            diffusers.UNet2DConditionModel.load_config(folder / "unet"),
            in_channels=8,
            num_class_embeds=1000,
        )
    unet.save_pretrained(folder / "unet")
    change_json(folder / "scheduler/scheduler_config.json", steps_offset=0)
    return _named(folder, "StableDiffusionUpscaleLDM3DPipeline")


def _named(folder: Path, class_name: str) -> Path:
    """``folder`` as that of an upscaler's pipeline, whose UNet knows levels of noise."""
    change_json(
        folder / "model_index.json",
        _class_name=class_name,
        low_res_scheduler=["diffusers", "DDPMScheduler"],
        max_noise_level=350,
        watermarker=[None, None],
    )
    return folder
