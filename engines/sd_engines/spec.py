"""What a model, its tensors and its fixed shapes are: frozen dataclasses, pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

Precision: TypeAlias = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "int8"]
"""What an engine computes in. tf32: what a GPU's tensor cores make of fp32, products of as many
digits as in fp16, added in fp32. fp8 (E4M3) and int8: 8-bit weights and activations in products and
convolutions, the rest in more."""
LOSSY: Final[tuple[Precision, ...]] = ("fp8", "int8")
"""Those that nobody gets who did not ask for them, unless there is nothing else."""
GRAPH_PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "fp16", "bf16")
"""Those that a component's graph can be in."""
BATCH = "batch"
"""The symbolic axis of every graph, its rows; all other axes but `PICTURES` are fixed."""
PICTURES = "pictures"
"""The axis of what several rows share: guidance makes two rows of each picture's sample. Row i is
of picture i modulo their number."""
STABLE_DIFFUSION_XL = "stable-diffusion-xl"
X4_UPSCALER = "stable-diffusion-x4-upscaler"
X2_UPSCALER = "stable-diffusion-x2-latent-upscaler"
LDM3D_UPSCALER = "ldm3d-upscaler"
"""Families' names, for where diffusers' pipelines of them do things otherwise."""
TIMESTEP_COND = "timestep_cond"
"""Input of a UNet that was distilled together with its guidance, and is told its scale there."""
CONTROLNET = "controlnet_"
CONTROL_EMBEDDING = "control_embedding_"
"""What the names of ControlNets begin with, ``controlnet_0``, …, and of what looks at the picture
for each, ``control_embedding_0``, …."""
RESIDUAL, MID_RESIDUAL = "down_block_additional_residual_", "mid_block_additional_residual"
"""Outputs of a ControlNet (the first with a number) and, added up, inputs of its UNet."""
POOLED_PROMPT_EMBEDS = "pooled_prompt_embeds"
TIME_IDS = "time_ids"
"""Inputs of a UNet of Stable Diffusion XL: the prompt as one vector, and sizes in pixels."""
DEPTH = "depth"
"""Output of an LDM3D's ``vae_decoder``: the channels in which it paints depth; an input of the
``vae_encoder`` of its upscaler."""
LOW_RES_IMAGE: Final = "low_res_image"
NOISE_LEVEL = "noise_level"
"""Inputs of an upscaler's UNet: the small picture with noise on it, and how much that is."""
LOW_RES_LATENTS: Final = "low_res_latents"
"""Input of a latent upscaler's UNet: the small picture's latents."""
IMAGE_LATENTS: Final = "image_latents"
"""Input of the UNet of LDM3D's upscaler: latents of the picture and its depth, once resized."""
MAX_TRAIN_TIMESTEPS: Final = 100_000
"""Of a scheduler's configuration: a hundred times what checkpoints are trained with, and quick."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""Components that read prompts, in the order in which their embeddings lie side by side."""

_UNET_INPUTS_OF_TEXT = (
    *("sample", "timestep", "encoder_hidden_states"),
    *(TIMESTEP_COND, POOLED_PROMPT_EMBEDS, TIME_IDS),
)


def is_halved(component: str) -> bool:
    """Whether the component's graph becomes half precision where that is asked for."""
    return component in ("unet", "unet_shallow") or component.startswith(CONTROLNET)


def draws_from_text(unet_inputs: Iterable[TensorSpec]) -> bool:
    """Whether a UNet of these inputs can draw from a prompt alone, with ControlNets or without.

    Others are shown a picture, read one as one token in the place of a prompt, or refine one, and
    are told five `TIME_IDS`, not six.
    """
    shapes = {spec.name: spec.shape[1:] for spec in unet_inputs}
    residuals = {name for name in shapes if name.startswith((RESIDUAL, MID_RESIDUAL))}
    return (
        shapes.keys() - residuals <= {*_UNET_INPUTS_OF_TEXT}
        and shapes.get("encoder_hidden_states", ())[:1] != (1,)
        and shapes.get(TIME_IDS) in (None, (6,))
    )


def caches_features(unet_outputs: Iterable[TensorSpec]) -> bool:
    """Whether a UNet of these outputs gives its deep features, which a shallow one then takes."""
    return any(spec.name == "deep_features" for spec in unet_outputs)


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and shape of a graph's input or output.

    Axis 0 is `BATCH` wherever it counts rows; its upper bound is `Profile.max_batch` of the
    component. It is `PICTURES`, which divides that, where rows share it. Others are integers.
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
        guided = component in (*TEXT_ENCODERS, "unet", "unet_shallow")
        guided = guided or component.startswith(CONTROLNET)
        guided = guided and all(spec.name != TIMESTEP_COND for spec in inputs)
        return self.batch_size * (2 if guided else 1)


@dataclass(frozen=True)
class Defaults:
    """What a request takes where it says nothing.

    ``strength`` is image-to-image's, ``inpainting_strength`` that of a request with a mask.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    strength: float = 0.8
    inpainting_strength: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """What the runtime must know of the checkpoint, whatever the backend.

    With ``force_zeros_for_empty_prompt`` the embeddings of a negative prompt that is not given are
    zeros. With ``requires_aesthetics_score`` the UNet is a refiner's: `TIME_IDS` ends in a score.
    An upscaler's noise levels are timesteps of ``low_res_scheduler``, a scheduler's configuration,
    from 0 to ``max_noise_level``; others have neither, and upscalers that put no noise on a picture
    the latter alone.
    """

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
    force_zeros_for_empty_prompt: bool = False
    requires_aesthetics_score: bool = False
    low_res_scheduler: dict[str, Any] | None = None
    max_noise_level: int | None = None
    controlnets: tuple[str, ...] = ()
    """Hub id, ``@`` and revision, or path of every ControlNet, in the order of their numbers."""
