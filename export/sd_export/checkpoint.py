"""What a checkpoint is, as data: its models' configs, and where their weights lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sd_engines.spec import Defaults
from sd_export.family import (
    family_of,
    is_refiner,
    latent_channels,
    painted_channels,
    text_encoders,
    vae_scale_factor,
)
from sd_export.kind import Kind, kind_of
from sd_export.model_files import WEIGHT_STEMS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sd_export.embedding import Embedding
    from sd_export.vae import Vae
    from sd_runtime.lora import Lora

_LDM3D_TARGET_RES = (1024, 1024)
"""What diffusers' StableDiffusionUpscaleLDM3DPipeline draws, whatever its UNet's config says."""
TOKENIZER_FOLDERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a checkpoint's parts lie, and their configs in diffusers' words.

    ``configs`` has ``text_encoder``, ``text_encoder_2``, both, or ``image_encoder`` in their place;
    ``unet``, ``vae``, ``scheduler``; and ``safety_checker`` or ``depth_estimator`` where the
    checkpoint has them, with ``feature_extractor`` where it has any model of pictures; the x4
    upscaler's has ``low_res_scheduler``. ``weights`` maps a model to its files, ``tokenizers`` a
    text encoder to its tokenizer's folder. ``max_noise_level`` is an upscaler's.
    ``single_file`` means the original layout: all models share one file, and the tokenizers are
    CLIP's own. ``assumed`` says what of it nobody stated. ``defaults`` are its pipeline's, and so
    is ``force_zeros_for_empty_prompt``.
    When a model is loaded ``loras`` are fused into it, ``embeddings`` added to tokenizer and text
    encoder. ``vae`` took the place of its own, with its config and weights in theirs;
    ``preview_vae`` is a tiny one beside it. The UNet is to read ``max_prompt_chunks`` prompts of
    the text encoder's length at once. ``controlnets`` maps ``controlnet_0``, … to where they are
    from; each is a model with a config and weights. ``card`` is its README.
    """

    source: str
    revision: str | None
    configs: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, tuple[Path, ...]]
    tokenizers: Mapping[str, Path]
    licenses: tuple[Path, ...] = ()
    card: Path | None = None
    license: str | None = None
    single_file: bool = False
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    max_prompt_chunks: int = 1
    vae: Vae | None = None
    preview_vae: Vae | None = None
    controlnets: Mapping[str, str] = field(default_factory=dict)
    assumed: str | None = None
    defaults: Defaults = field(default_factory=Defaults)
    force_zeros_for_empty_prompt: bool = False
    max_noise_level: int | None = None

    def is_in_original_layout(self, component: str) -> bool:
        """Whether the names of the component's weights are to be translated."""
        if component == "vae" and self.vae is not None:
            return self.vae.single_file
        return self.single_file and component in WEIGHT_STEMS

    @property
    def latent_channels(self) -> int:
        """Channels of the latents; a UNet that is fed more of them is for another task."""
        return latent_channels(self.configs["vae"])

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a picture's side to one of its latents'."""
        return vae_scale_factor(self.configs["vae"]["block_out_channels"])

    @property
    def kind(self) -> Kind:
        """What the UNet is for."""
        return kind_of(self.configs)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that its pipeline draws where it is not told."""
        if self.kind is Kind.LDM3D_UPSCALER:
            return _LDM3D_TARGET_RES
        sample = self.configs["unet"].get("sample_size") or 64
        rows, columns = (sample, sample) if isinstance(sample, int) else sample
        return rows * self.vae_scale_factor, columns * self.vae_scale_factor

    @property
    def depth_channels(self) -> int:
        """Channels in which the VAE paints depth beside the picture: 0 but of LDM3D's."""
        return painted_channels(self.configs) - 3

    @property
    def requires_aesthetics_score(self) -> bool:
        """Whether the UNet is told how much people liked the picture, as XL's refiner is."""
        return is_refiner(self.configs)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The models that read prompts, in the order in which their embeddings lie."""
        return text_encoders(self.configs)

    def embeddings_of(self, text_encoder: str) -> tuple[Embedding, ...]:
        """Those of ``embeddings`` that are for one text encoder."""
        return tuple(e for e in self.embeddings if e.text_encoder == text_encoder)

    @property
    def max_prompt_tokens(self) -> int:
        """How many tokens a prompt has, the first and the last included; a picture is one."""
        if not self.text_encoders:
            return 1
        return int(self.configs[self.text_encoders[0]].get("max_position_embeddings", 77))

    @property
    def family(self) -> str:
        """The family's name in the manifest."""
        return family_of(self.configs)

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts, in diffusers' word."""
        return str(self.configs["scheduler"].get("prediction_type", "epsilon"))
