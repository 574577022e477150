"""Textual inversion: vectors learned for a new word, which a bundle's prompts then know.

Gal et al., "An Image is Worth One Word", 2022, arXiv:2208.01618. Files of AUTOMATIC1111
(``string_to_param``) and of diffusers (one token and its tensor); for Stable Diffusion XL those of
both, with a tensor for each text encoder (``clip_l`` and ``clip_g``), or a file of diffusers for
each. A word of several vectors stands for the tokens ``word``, ``word_1``, ``word_2`` …, as in
diffusers, in the tokenizers and in prompts. As there too, XL's pooled prompt is that of the last
learned token in it, whose number is the highest, in the place of its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sd_engines.errors import ConfigError, ExportError
from sd_export.weights import Place, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_A1111 = "string_to_param.*"
_OF_XL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_NAMELESS = (_A1111, "emb_params", *_OF_XL.values())
"""Keys of AUTOMATIC1111's that are no token; the file's own name is, where it notes none."""
_SUFFIXES = (".safetensors", ".bin", ".pt")
_USE = "Give an embedding of Stable Diffusion's own width: FILE.safetensors or FILE.pt=TOKEN."


@dataclass(frozen=True)
class Embedding:
    """One tensor of a file, and for which text encoder; ``tokens`` stand for its vectors."""

    path: Path
    text_encoder: str
    key: str
    tokens: tuple[str, ...]

    def vectors(self) -> torch.Tensor:
        """float32 [len(tokens), d]; `ExportError` where they are not finite."""
        with Weights((self.path,), component="embedding") as weights:
            vectors = weights.tensor(Place(self.key)).detach().to(torch.float32)
        if not bool(torch.isfinite(vectors).all()):
            raise _error(f"{self.path.name} holds values that are not finite")
        return vectors.reshape(len(self.tokens), -1)


def find_embeddings(texts: Sequence[str], *, widths: Mapping[str, int]) -> tuple[Embedding, ...]:
    """What ``FILE`` or ``FILE=TOKEN`` name, for text encoders of vectors so wide, by their names.

    `ConfigError` for words that name none, or one token twice; `ExportError` for a file that
    holds none, or one of another width, or a word that one of several encoders would not know.
    """
    embeddings = tuple(embedding for text in texts for embedding in _find(text, widths=widths))
    owners: dict[tuple[str, str], Path] = {}
    for embedding in embeddings:
        for token in embedding.tokens:
            other = owners.setdefault((embedding.text_encoder, token.lower()), embedding.path)
            if other is not embedding.path:
                raise ConfigError(
                    f"{other} and {embedding.path} both are for the token {token!r}",
                    "Rename one: --embedding FILE=TOKEN.",
                )
    for embedding in embeddings:
        for name in widths:
            if (name, embedding.tokens[0].lower()) not in owners:
                raise _error(
                    f"{embedding.path.name} is for one text encoder, the checkpoint has "
                    f"{len(widths)}: nothing is for {embedding.tokens[0]!r} of the {name}"
                )
    return embeddings


def add_tokens(tokenizer: Any, embeddings: Sequence[Embedding]) -> None:
    """Teach transformers' ``tokenizer`` the tokens; `ConfigError` for one it has already."""
    for embedding in embeddings:
        for token in embedding.tokens:
            if token in tokenizer.get_vocab():
                raise ConfigError(
                    f"{embedding.path.name}: {token!r} is a token of the checkpoint already",
                    f"Name another: --embedding {embedding.path}=TOKEN.",
                )
            tokenizer.add_tokens(token)


def add_vectors(text_encoder: Any, embeddings: Sequence[Embedding], *, first: int) -> None:
    """Give the text encoder the vectors, as rows from number ``first`` on."""
    table = text_encoder.get_input_embeddings()
    rows = torch.cat([table.weight[:first], *(e.vectors() for e in embeddings)])
    unused = table.weight[len(rows) :]  # of a table with more rows than the tokenizer has tokens
    table.weight = torch.nn.Parameter(torch.cat([rows, unused]), requires_grad=False)
    table.num_embeddings = len(table.weight)


def _find(text: str, *, widths: Mapping[str, int]) -> tuple[Embedding, ...]:
    path, token = Path(text).expanduser(), None
    name, equals, word = text.rpartition("=")
    if equals and not path.exists():
        path, token = Path(name).expanduser(), word
    if not path.is_file():
        raise ConfigError(f"--embedding {text}: no such file", _USE)
    if path.suffix not in _SUFFIXES:
        known = ", ".join(_SUFFIXES)
        raise ConfigError(f"--embedding {text}: not a weight file", f"Known: {known}.")
    with Weights((path,), component="embedding") as weights:
        keys = _keys(weights, path, widths)
        shapes = {encoder: weights.shape(key) for encoder, key in keys.items()}
        if token is None:
            key = next(iter(keys.values()))
            token = weights.notes.get("name", path.stem) if key in _NAMELESS else key
    if not token or token != token.strip() or not token.isprintable():
        raise ConfigError(
            f"--embedding {text}: {token!r} is no token",
            f"Name one, with no space around it: --embedding {path}=TOKEN.",
        )
    found = []
    for encoder, shape in shapes.items():
        if len(shape) not in (1, 2) or 0 in shape or shape[-1] != widths[encoder]:
            raise _error(
                f"{path.name} is {' × '.join(map(str, shape)) or 'a number'}, the checkpoint's "
                f"{encoder} takes vectors of {widths[encoder]}"
            )
        count = shape[0] if len(shape) == 2 else 1
        tokens = token, *(f"{token}_{i}" for i in range(1, count))
        found.append(Embedding(path, encoder, keys[encoder], tokens))
    return tuple(found)


def _keys(weights: Weights, path: Path, widths: Mapping[str, int]) -> dict[str, str]:
    """Text encoder → the key of its tensor. What is for the other one a refiner leaves aside."""
    keys = list(weights)
    if "text_encoder_2" in widths and keys and {*keys} <= {*_OF_XL.values()}:
        found = {encoder: _OF_XL[encoder] for encoder in widths if _OF_XL[encoder] in keys}
        if not found:
            raise _error(f"{path.name} holds {keys[0]}, which is not for the checkpoint's encoder")
        return found
    key = _A1111 if _A1111 in keys else keys[0] if len(keys) == 1 else None
    if key is None:
        held = f"{len(keys)} tensors" if keys else "no tensor"
        hint = "; it is for Stable Diffusion XL" if {"clip_g", "clip_l"} & {*keys} else ""
        raise _error(f"{path.name} holds {held}, not one embedding{hint}")
    shape = weights.shape(key)
    fitting = [encoder for encoder, width in widths.items() if shape and shape[-1] == width]
    return {next(iter(fitting or widths)): key}


def _error(message: str) -> ExportError:
    return ExportError(message, _USE, component="embedding", stage="load")
