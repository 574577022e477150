"""A recipe as text in the form that AUTOMATIC1111's web UI writes and other tools read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_runtime.control_options import CONTROL_NUMBERS, numbers_each

if TYPE_CHECKING:
    from sd_runtime.recipe import Recipe


def infotext(recipe: Recipe) -> str:
    """The prompt, the negative one, and a line of ``name: value``, without what is as ever."""
    lines = [recipe.prompt]
    if recipe.negative_prompt:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    values = {
        "Steps": recipe.num_inference_steps,
        "Sampler": recipe.scheduler,
        "CFG scale": f"{recipe.guidance_scale:g}",
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.fingerprint[:10],
        "Model": recipe.model.replace(",", " "),
        "Version": "sd-toolkit",
    }
    if recipe.vae is not None:
        values["VAE"] = recipe.vae.replace(",", " ")
    if (recipe.guidance_start, recipe.guidance_stop) != (0, 1):
        values["CFG interval"] = f"{recipe.guidance_start:g} to {recipe.guidance_stop:g}"
    if recipe.safety_guidance is not None:
        values["Safety guidance"] = recipe.safety_guidance
    if recipe.strength is not None:
        values["Denoising strength"] = f"{recipe.strength:g}"
    if recipe.noise_level is not None:
        values["Noise level"] = recipe.noise_level
    if recipe.loras:
        values["Lora hashes"] = " ".join(lora[:10] for lora in recipe.loras)
    for index, (scale, start, end) in enumerate(_controls(recipe)):
        words = f"Weight: {scale:g}, Guidance Start: {start:g}, Guidance End: {end:g}"
        values[f"ControlNet {index}"] = f'"{words}"'
    if recipe.refiner is not None and recipe.high_noise_frac is not None:
        values["Refiner"] = recipe.refiner.replace(",", " ")
        values["Refiner switch at"] = f"{recipe.high_noise_frac:g}"
    if recipe.cache_interval != 1:
        values["Cache interval"] = recipe.cache_interval
    if recipe.prompt_weighting:
        values["Prompt weighting"] = "A1111"
    if recipe.eta:
        values["Eta"] = f"{recipe.eta:g}"
    lines.append(", ".join(f"{name}: {value}" for name, value in values.items()))
    return "\n".join(lines)


def _controls(recipe: Recipe) -> list[tuple[float, ...]]:
    """Scale, start and end of each ControlNet."""
    count = len(recipe.control_image or ())
    each = [numbers_each(getattr(recipe, name), count) for name in CONTROL_NUMBERS]
    return list(zip(*each, strict=True))
