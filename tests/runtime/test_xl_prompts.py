r"""Weighted and long prompts of Stable Diffusion XL, against AUTOMATIC1111's own code.

``a1111_xl_embeds.npz`` holds what its unmodified ``modules/sd_hijack_clip.py`` (commit e2b19900ec,
``comma_padding_backtrack`` 0) makes of every text in `CASES` with transformers' encoders of the
same checkpoint: each encoder's by ``FrozenCLIPEmbedderForSDXLWithCustomWords``, side by side, and
the pooled ones; the shorter of a pair is padded with what it makes of empty text. Pictures are
drawn from those by diffusers' unmodified pipeline. Learned words are its own to load.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pictures import assert_drawn_alike
from sd_export import export
from sd_runtime import Pipeline, Request
from sd_runtime.recipe import Recipe
from tiny_xl import make_xl_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import TinyModel

CASES = [
    (r"a (red) [cat] ((dog:0.5) horse) \(white\) (unclosed [x", "(blue:1.5), a ] b)"),
    ("a (red:1.4) circle, " * 14 + "[end]", "(dog)"),
    ("(long:0.9) " * 20 + "(b:1.1) " * 70, "a " * 80),
]
LEARNED = [
    {
        key: 3 * torch.randn((count, width), generator=torch.Generator().manual_seed(seed))
        for seed, (key, width) in enumerate((("clip_l", 8), ("clip_g", 16)))
    }
    for count in (1, 3)
]
"""What was learned for ``<toy>``, one vector, and ``style``, three, by text encoder."""
PLAIN_LONG = "a red circle and a large cat, " * 20
# diffusers' schedulers, of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def make_checkpoint(folder: Path) -> Path:
    """Embeddings of random weights have a mean of 0, which cannot be restored: these have not."""
    make_xl_checkpoint(folder, block_out_channels=(16,), text_width=8)
    for encoder in ("text_encoder", "text_encoder_2"):
        path = folder / encoder / "model.safetensors"
        weights = load_file(path)
        (name,) = (name for name in weights if name.endswith("position_embedding.weight"))
        weights[name] += 2
        save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def embeds() -> Any:
    return np.load(Path(__file__).parent / "prompt_weighting" / "a1111_xl_embeds.npz")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("xl_prompts") / "checkpoint")


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Any:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    for tensors, token in zip(LEARNED, ("<toy>", "style"), strict=True):
        for key, number in (("clip_l", ""), ("clip_g", "_2")):
            pipeline.load_textual_inversion(
                tensors[key],
                token=token,
                tokenizer=getattr(pipeline, f"tokenizer{number}"),
                text_encoder=getattr(pipeline, f"text_encoder{number}"),
            )
    return pipeline


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Iterator[Pipeline]:
    """Of two chunks a prompt, with two learned words."""
    bundle = checkpoint.parent / "bundle"
    style, toy = (checkpoint.parent / name for name in ("style.safetensors", "toy.safetensors"))
    save_file(LEARNED[0], toy)
    save_file(LEARNED[1], style)
    export(checkpoint, bundle, max_prompt_chunks=2, embeddings=[f"{toy}=<toy>", str(style)])
    with Pipeline.load(bundle, threads=1) as pipeline:
        yield pipeline


def prompt_inputs(embeds: Any, case: object) -> dict[str, torch.Tensor]:
    """What diffusers' pipeline takes in the place of the texts of a case."""
    names = {
        "prompt_embeds": "prompt",
        "negative_prompt_embeds": "negative",
        "pooled_prompt_embeds": "pooled_prompt",
        "negative_pooled_prompt_embeds": "pooled_negative",
    }
    return {name: torch.from_numpy(embeds[f"{kept}_{case}"])[None] for name, kept in names.items()}


@pytest.mark.parametrize("case", range(len(CASES)))
def test_words_weigh_what_they_weigh_to_automatic1111(
    pipeline: Pipeline, oracle: Any, embeds: Any, case: int
) -> None:
    prompt, negative = CASES[case]
    request = Request(
        prompt, negative_prompt=negative, seed=7, num_inference_steps=3, prompt_weighting=True
    )
    result = assert_drawn_alike(pipeline, oracle, request, **prompt_inputs(embeds, case))
    (recipe,) = result.recipes
    again = pipeline.generate(Recipe.from_json(vars(recipe)).request())
    assert np.array_equal(again.pixels, result.pixels)


def test_a_refiner_weighs_them_too(
    pipeline: Pipeline, oracle: Any, refiner_model: TinyModel, embeds: Any
) -> None:
    prompt, negative = CASES[0]
    request = Request(
        prompt,
        negative_prompt=negative,
        seed=7,
        num_inference_steps=4,
        prompt_weighting=True,
        high_noise_frac=0.5,
    )
    generator = torch.Generator("cpu").manual_seed(7)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "generator": generator}
    inputs = prompt_inputs(embeds, 0)
    latents = oracle(denoising_end=0.5, output_type="latent", **options, **inputs).images
    inputs = prompt_inputs(embeds, "refiner")
    expected = refiner_model.oracle(image=latents, denoising_start=0.5, **options, **inputs)
    with Pipeline.load(pipeline.bundle.path, threads=1, refiner=refiner_model.bundle) as pair:
        pixels = pair.generate(request).pixels[0].astype(int)
    assert (np.abs(pixels - np.asarray(expected.images[0])) <= 1).mean() >= 0.999


def test_without_brackets_nothing_weighs_more(pipeline: Pipeline) -> None:
    plain = Request("a red circle", seed=7, num_inference_steps=1)
    weighed = Request("a red circle", seed=7, num_inference_steps=1, prompt_weighting=True)
    drawn = [pipeline.generate(request).latents for request in (plain, weighed)]
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize(
    ("prompt", "negative"), [("a red cat", None), ("", "a dog"), ("a " * 75, "")]
)
def test_a_prompt_of_one_chunk_is_drawn_as_ever(
    pipeline: Pipeline, oracle: Any, prompt: str, negative: str | None
) -> None:
    request = Request(prompt, negative_prompt=negative, seed=7, num_inference_steps=3)
    assert_drawn_alike(pipeline, oracle, request, prompt=prompt, negative_prompt=negative)


@pytest.mark.parametrize("negative", [None, "a dog"])
def test_a_long_prompt_is_every_chunk_of_it(
    pipeline: Pipeline, oracle: Any, negative: str | None
) -> None:
    """Against transformers' tokenizers and encoders, chunk by chunk; the first is pooled."""

    def encoded(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, pooled = [], None
        for number in ("", "_2"):
            tokenizer = getattr(oracle, f"tokenizer{number}")
            ids = tokenizer(text, add_special_tokens=False).input_ids[:150]
            rows = [ids[:75], ids[75:]]
            rows = [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in rows]
            rows = [row + [tokenizer.pad_token_id] * (77 - len(row)) for row in rows]
            with torch.no_grad():
                found = getattr(oracle, f"text_encoder{number}")(
                    torch.tensor(rows), output_hidden_states=True
                )
            embeds.append(found.hidden_states[-2].flatten(0, 1))
            pooled = found.get("text_embeds")
        assert pooled is not None
        return torch.cat(embeds, dim=-1)[None], pooled[:1]

    prompt = encoded(PLAIN_LONG)
    zeros = torch.zeros_like(prompt[0]), torch.zeros_like(prompt[1])
    beside = zeros if negative is None else encoded(negative)
    request = Request(PLAIN_LONG, negative_prompt=negative, seed=7, num_inference_steps=3)
    assert_drawn_alike(
        pipeline,
        oracle,
        request,
        prompt_embeds=prompt[0],
        pooled_prompt_embeds=prompt[1],
        negative_prompt_embeds=beside[0],
        negative_pooled_prompt_embeds=beside[1],
    )


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a <toy> in the style of style", None),
        ("style,style " + "a " * 66, "Style_2 <TOY>"),
        ("a red style", "a dog"),
    ],
)
def test_learned_words_draw_as_in_diffusers(
    pipeline: Pipeline, oracle: Any, prompt: str, negative: str | None
) -> None:
    request = Request(prompt, negative_prompt=negative, seed=7, num_inference_steps=3)
    drawn = assert_drawn_alike(pipeline, oracle, request, prompt=prompt, negative_prompt=negative)
    plain = pipeline.generate(
        Request("a in the of", negative_prompt=negative, seed=7, num_inference_steps=3)
    )
    assert not np.allclose(drawn.latents, plain.latents, atol=0.01)
