"""Makes a checkpoint shaped like Stable Diffusion v1-4 with random weights.

``python benchmarks/make_checkpoint.py FOLDER [--dtype fp16] [--no-safety-checker]``

What it takes to export, build and time the real thing where the real thing cannot be had: the
same layout, configs, shapes and vocabulary, none of the knowledge. Weights are drawn so that
activations stay of order one; they are made a model at a time, in the dtype they are stored in.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd_export.clip_vocabulary import clip_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
CONFIGS = Path(__file__).parents[1] / "export/sd_export/configs/v1.json"
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
PROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
}


def save_model(
    folder: Path,
    name: str,
    build: Callable[[], Any],
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """Write ``build()``'s config and random weights for it; the model itself is never filled."""
    with torch.device("meta"):
        model = build()
    tensors = {}
    for key, like in model.state_dict().items():
        if like.ndim < 2:
            # ones and zeros would be folded away, and figures come out too good
            is_scale = key.endswith("weight") and "embeds" not in key
            tensors[key] = torch.empty(like.shape, dtype=dtype)
            tensors[key].normal_(float(is_scale), 0.1, generator=generator)
        else:
            std = 0.02 if "embedding" in key else 1 / math.sqrt(math.prod(like.shape[1:]))
            tensors[key] = torch.empty(like.shape, dtype=dtype).normal_(0, std, generator=generator)
    if "concept_embeds" in tensors:  # thresholds that random pictures do not reach
        tensors["concept_embeds_weights"].fill_(0.5)
        tensors["special_care_embeds_weights"].fill_(0.5)
    folder.mkdir(parents=True)
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    config = dict(model.config) if isinstance(model.config, dict) else model.config.to_dict()
    config = {key: value for key, value in config.items() if not isinstance(value, torch.dtype)}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=list))


def make_checkpoint(
    folder: Path, *, dtype: torch.dtype, safety_checker: bool = True, seed: int = 0
) -> None:
    """Write the whole checkpoint in the diffusers layout."""
    configs = json.loads(CONFIGS.read_text())
    generator = torch.Generator().manual_seed(seed)
    diffusion = "diffusion_pytorch_model"
    models: list[tuple[str, str, Callable[[], Any]]] = [
        ("unet", diffusion, lambda: UNet2DConditionModel.from_config(configs["unet"])),
        ("vae", diffusion, lambda: AutoencoderKL.from_config(configs["vae"])),
        (
            "text_encoder",
            "model",
            lambda: CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
        ),
    ]
    if safety_checker:
        config = CLIPConfig(vision_config=VISION, projection_dim=768)
        models.append(("safety_checker", "model", lambda: StableDiffusionSafetyChecker(config)))
    for part, name, build in models:
        save_model(folder / part, name, build, dtype=dtype, generator=generator)
        print(f"{part} written", flush=True)  # noqa: T201
    vocabulary, merges = clip_vocabulary()
    CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        model_max_length=77,
    ).save_pretrained(folder / "tokenizer")
    PNDMScheduler.from_config(configs["scheduler"]).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    if safety_checker:
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        (folder / "feature_extractor").mkdir()
        (folder / "feature_extractor/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def main() -> None:
    """Read the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16")
    parser.add_argument("--no-safety-checker", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_checkpoint(
        arguments.folder,
        dtype=DTYPES[arguments.dtype],
        safety_checker=not arguments.no_safety_checker,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()
