"""Makes the tokenizer of the shipped checkpoint and gives its text encoder a head start.

Trained from the noise of the diffusion loss alone, the text encoder needs most of the run to
learn which adjective belongs to which shape. Here it learns that first, for a hundredth of the
cost: nine queries, one per place, attend to its output and must name what stands there. The
queries are thrown away; the encoder stays as it is when the UNet learns from it.

Most words it reads are never drawn. With the palette's eight colours and the checker's five shapes
alone it learns their pairs by heart: it read 38 % of captions with a pair it had not seen, and the
pictures obeyed as many. With these words beside them 99 % are read.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from descent import Descent
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd_bench.scene import (
    ANY_SHAPE,
    BACKGROUNDS,
    COLORS,
    MORE_SHAPES,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    caption,
    lesson,
    random_scene,
)

UNDRAWN_COLORS = (
    *("amber", "beige", "coral", "crimson", "gold", "indigo", "khaki", "lavender"),
    *("lime", "magenta", "maroon", "olive", "silver", "teal", "turquoise", "violet"),
)
UNDRAWN_SHAPES = (
    *("bell", "bolt", "cloud", "cone", "crown", "cube", "drop", "flower"),
    *("house", "key", "leaf", "octagon", "oval", "pentagon", "ring", "wheel"),
)
COLOR_WORDS = (*COLORS, *UNDRAWN_COLORS)
SHAPE_WORDS = (*SHAPES, *MORE_SHAPES, ANY_SHAPE, *UNDRAWN_SHAPES)
MAX_TOKENS = 77
WIDTH = 128


def reworded(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with about half of its colours and shapes replaced by words that no one draws."""
    colors = iter(rng.permutation(UNDRAWN_COLORS))  # all different, as in any scene
    things = []
    for thing in scene.things:
        color = str(next(colors)) if rng.random() < 0.5 else thing.color
        shape = str(rng.choice(UNDRAWN_SHAPES)) if rng.random() < 0.4 else thing.shape
        things.append(replace(thing, color=color, shape=shape))
    return replace(scene, things=tuple(things))


def new_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges learned from captions: about one token a word."""
    rng = np.random.default_rng(0)
    captions = [caption(reworded(lesson(rng), rng), rng) for _ in range(5000)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=5000, initial_alphabet=alphabet, end_of_word_suffix="</w>", min_frequency=2
        ),
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(f"{a}</w>" for a in alphabet), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=WIDTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


class Reader(nn.Module):
    """Asks the text encoder's output what stands at each place, and what the background is.

    Nothing but attention and a linear map, as in the UNet: each attribute must lie open.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(PLACES) + 1, WIDTH) * 0.5)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.sizes = [len(words) + 1 for words in (COLOR_WORDS, SHAPE_WORDS, SIZES, BACKGROUNDS)]
        self.head = nn.Linear(WIDTH, sum(self.sizes))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        queries = self.queries.expand(len(hidden), -1, -1)
        read, _ = self.attention(queries, hidden, hidden, need_weights=False)
        return self.head(read).split(self.sizes, dim=-1)


def answers(scene: Scene) -> np.ndarray:
    """What the reader should say, int64 [places + 1, 4]; 0 is nothing."""
    table = np.zeros((len(PLACES) + 1, 4), dtype=np.int64)
    for thing in scene.things:
        if thing.place is not None:
            table[list(PLACES).index(thing.place), :3] = (
                1 + COLOR_WORDS.index(thing.color),
                1 + SHAPE_WORDS.index(thing.shape),
                1 + list(SIZES).index(thing.size),
            )
    if scene.background is not None:
        table[-1, 3] = 1 + list(BACKGROUNDS).index(scene.background)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="gets tokenizer/ and text_encoder/")
    parser.add_argument("--minutes", type=float, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    tokenizer = new_tokenizer(args.output / "tokenizer")
    encoder, reader = new_text_encoder(tokenizer), Reader()
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    print(f"{len(tokenizer)} tokens", flush=True)
    descent = Descent(optimizer, minutes=args.minutes, learning_rate=1e-3, warm_up=100)
    for _ in descent:
        scenes = [reworded(lesson(rng), rng) for _ in range(64)]
        ids = token_ids(tokenizer, [caption(scene, rng) for scene in scenes])
        with torch.autocast("cpu", torch.bfloat16):
            read = reader(encoder(ids).last_hidden_state)
        wanted = torch.from_numpy(np.stack([answers(scene) for scene in scenes]))
        loss = torch.stack(
            [
                nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted[..., i].flatten())
                for i, logits in enumerate(read)
            ]
        ).sum()
        descent.step(loss)
        if descent.steps % 100 == 0:
            print(f"step {descent.steps} loss {float(loss):.4f}", flush=True)
    encoder.save_pretrained(args.output / "text_encoder")
    held_out = [random_scene(rng, held_out=True) for _ in range(500)]
    with torch.no_grad():
        ids = token_ids(tokenizer, [caption(scene, rng) for scene in held_out])
        read = reader(encoder(ids).last_hidden_state)
    wanted = torch.from_numpy(np.stack([answers(scene) for scene in held_out]))
    right = torch.stack([r.argmax(-1) == wanted[..., i] for i, r in enumerate(read)])
    whole = right.all(dim=0).all(dim=1).float().mean()
    print(f"held-out captions read right: {float(whole):.1%}", flush=True)


if __name__ == "__main__":
    main()
