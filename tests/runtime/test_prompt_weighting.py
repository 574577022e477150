r"""Weighted and long prompts, against diffusers' community pipeline `lpw_stable_diffusion`.

That pipeline is no part of the package diffusers, so what it made is kept:
``lpw_embeds.npz`` holds ``get_weighted_text_embeddings(pipe, prompt, negative,
max_embeddings_multiples=2)`` of every pair in `CASES`, by the unmodified file of diffusers' commit
58eb52c080, on the same checkpoint, whose text encoder was given the name ``text_model`` that it
had until transformers 5. Pictures are drawn from those by diffusers' unmodified pipeline.
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
from sd_engines.errors import ConfigError
from sd_export.cli import main
from sd_runtime import Pipeline, Request
from sd_runtime.prompt_weighting import weighted_parts
from sd_runtime.recipe import Recipe
from tiny import make_smallest_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator


EMBEDS = np.load(Path(__file__).parent / "prompt_weighting" / "lpw_embeds.npz")
CASES = [
    (
        r"a (red) [cat] ((dog:0.5) horse) \(white\) (unclosed [x",
        "(blue:1.5), :1.2) a ] b)",
    ),
    (r"(a cat:-0.7) and 1:2) \ \\ [[square]]", ""),
    ("a (red:1.4) circle, " * 14 + "[end]", "(dog)"),
    ("a cat", "(b:1.2) " * 76),  # the prompt is padded to the negative one's two chunks
    ("(long:0.9) " * 20 + "(b:1.1) " * 140, "a " * 80),  # and cut at the end of the second
]
PLAIN_LONG = "a red circle and a large cat, " * 20
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of random weights have a mean of 0, which cannot be restored: these have not."""
    folder = tmp_path_factory.mktemp("long") / "checkpoint"
    make_smallest_checkpoint(folder, text_layers=2)  # as of the values beside this file
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    (name,) = (name for name in weights if name.endswith("final_layer_norm.bias"))
    weights[name] = torch.linspace(-0.5, 1.5, 8)
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Any:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Iterator[Pipeline]:
    """Of two chunks a prompt."""
    bundle = checkpoint.parent / "bundle"
    options = ["--model", str(checkpoint), "--output", str(bundle), "--max-prompt-chunks", "2"]
    assert main([*options, "--backend", "onnxruntime", "--quiet"]) == 0
    with Pipeline.load(bundle, threads=1) as pipeline:
        yield pipeline


@pytest.mark.parametrize("case", range(len(CASES)))
def test_pictures_are_those_of_the_long_prompt_weighting_pipeline(
    pipeline: Pipeline, oracle: Any, case: int
) -> None:
    prompt, negative = CASES[case]
    request = Request(
        prompt, negative_prompt=negative, seed=7, num_inference_steps=3, prompt_weighting=True
    )
    inputs = {
        f"{kind}_embeds": torch.from_numpy(EMBEDS[f"{name}_{case}"])[None]
        for kind, name in (("prompt", "prompt"), ("negative_prompt", "negative"))
    }
    result = assert_drawn_alike(pipeline, oracle, request, **inputs)
    (recipe,) = result.recipes
    again = pipeline.generate(Recipe.from_json(vars(recipe)).request())
    assert np.array_equal(again.pixels, result.pixels)
    assert "Prompt weighting: A1111" in recipe.parameters()


@pytest.mark.parametrize("prompt", ["a (red:1.3) [cat]", "", "a " * 75])
def test_a_prompt_of_one_chunk_is_drawn_as_ever(
    pipeline: Pipeline, oracle: Any, prompt: str
) -> None:
    request = Request(prompt, seed=7, num_inference_steps=3)
    assert_drawn_alike(pipeline, oracle, request, prompt=prompt)


def test_a_long_prompt_is_every_chunk_of_it(pipeline: Pipeline, oracle: Any) -> None:
    """Against transformers' tokenizer and text encoder, chunk by chunk."""
    ids = oracle.tokenizer(PLAIN_LONG, add_special_tokens=False).input_ids[:150]
    start, end = oracle.tokenizer.bos_token_id, oracle.tokenizer.eos_token_id
    empty = torch.tensor([[start] + 76 * [end]])
    chunks = [torch.tensor([[start, *ids[first : first + 75], end]]) for first in (0, 75)]
    with torch.no_grad():
        embeds, negative = (
            torch.cat([oracle.text_encoder(chunk).last_hidden_state for chunk in all_], dim=1)
            for all_ in (chunks, [empty, empty])
        )
    request = Request(PLAIN_LONG, seed=7, num_inference_steps=3)
    assert_drawn_alike(
        pipeline, oracle, request, prompt_embeds=embeds, negative_prompt_embeds=negative
    )


def test_what_two_chunks_do_not_hold_is_named(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "(" + "a " * 150 + ":1.1) red Cat"
    pipeline.generate(Request(prompt, num_inference_steps=1, prompt_weighting=True))
    assert "longer than 152 tokens" in caplog.text
    assert caplog.text.rstrip().endswith("ignored: red Cat")


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [  # what lpw_stable_diffusion's parse_prompt_attention gives
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55),
             (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
        ),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a:b:1.3) c)", [("a:b:1.3) c)", 1)]),
        ("((a)(b:2)[c", [("a", 1.21), ("b", 2.2), ("c", 1)]),
        ("[a:1.5)", [("a:1.5)", 1 / 1.1)]),
        ("([a)]", [("a", 1)]),
        ("", [("", 1)]),
        ("(a: +1.5 )", [("a", 1.5)]),  # with spaces, as AUTOMATIC1111 has come to read it
    ],
)  # fmt: skip
def test_brackets_are_read_as_by_automatic1111(prompt: str, parts: list[tuple[str, float]]) -> None:
    found = weighted_parts(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in parts], rtol=1e-12)


def test_a_hundred_thousand_brackets_are_read() -> None:
    """By work for each of them on all before it, that would take minutes."""
    assert weighted_parts("[" * 100_000) == (("", 1),)
    assert weighted_parts("([" * 50_000 + "])" * 50_000) == (("", 1),)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "(a:1.2.3)", "prompt_weighting": True}, "'1.2.3' .* is no number"),
        ({"negative_prompt": "(a:.)", "prompt_weighting": True}, "'.' .* is no number"),
        ({"prompt": f"((a:0):{'9' * 400})", "prompt_weighting": True}, "'a' .* counts nan times"),
        ({"prompt_weighting": 1}, "prompt_weighting is 1"),
    ],
)
def test_requests_that_cannot_be_weighed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Request(**{"prompt": "a cat", **options})


@pytest.mark.parametrize("chunks", [0, 13])
def test_numbers_of_chunks_that_no_bundle_has(
    tmp_path: Path, chunks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", str(tmp_path / "b"), "--max-prompt-chunks", str(chunks)]
    assert main(["--model", str(tmp_path), *options]) == 2
    assert "Take 1 to 12" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
