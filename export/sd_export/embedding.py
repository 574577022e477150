"""Textual inversion: vectors learned for a new word, which a bundle's prompts then know.

Gal et al., "An Image is Worth One Word", 2022, arXiv:2208.01618. Files of AUTOMATIC1111
(``string_to_param``) and of diffusers (one token and its tensor). A word of several vectors stands
for the tokens ``word``, ``word_1``, ``word_2`` …, as in diffusers, in the tokenizer and in prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sd_engines.errors import ConfigError, ExportError
from sd_export.weights import Place, Weights

if TYPE_CHECKING:
    from collections.abc import Sequence

_A1111 = "string_to_param.*"
_NAMELESS = (_A1111, "emb_params")
"""Keys of AUTOMATIC1111's that are no token; the file's own name is, where it notes none."""
_SUFFIXES = (".safetensors", ".bin", ".pt")
_USE = "Give an embedding of Stable Diffusion's own width: FILE.safetensors or FILE.pt=TOKEN."


@dataclass(frozen=True)
class Embedding:
    """One file, and the key of its tensor; ``tokens`` stand for its vectors, one each."""

    path: Path
    key: str
    tokens: tuple[str, ...]

    def vectors(self) -> torch.Tensor:
        """float32 [len(tokens), d]; `ExportError` where they are not finite."""
        with Weights((self.path,), component="embedding") as weights:
            vectors = weights.tensor(Place(self.key)).detach().to(torch.float32)
        if not bool(torch.isfinite(vectors).all()):
            raise _error(f"{self.path.name} holds values that are not finite")
        return vectors.reshape(len(self.tokens), -1)


def find_embeddings(texts: Sequence[str], *, width: int) -> tuple[Embedding, ...]:
    """What ``FILE`` or ``FILE=TOKEN`` name, for a text encoder whose vectors are ``width`` wide.

    `ConfigError` for words that name none, or one token twice; `ExportError` for a file that
    holds none, or one of another width.
    """
    embeddings = tuple(_find(text, width=width) for text in texts)
    owners: dict[str, Path] = {}
    for embedding in embeddings:
        for token in embedding.tokens:
            other = owners.setdefault(token.lower(), embedding.path)
            if other is not embedding.path:
                raise ConfigError(
                    f"{other} and {embedding.path} both are for the token {token!r}",
                    "Rename one: --embedding FILE=TOKEN.",
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


def _find(text: str, *, width: int) -> Embedding:
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
        keys = list(weights)
        key = _A1111 if _A1111 in keys else keys[0] if len(keys) == 1 else None
        if key is None:
            held = f"{len(keys)} tensors" if keys else "no tensor"
            hint = "; it is for Stable Diffusion XL" if {"clip_g", "clip_l"} & {*keys} else ""
            raise _error(f"{path.name} holds {held}, not one embedding{hint}")
        shape = weights.shape(key)
        if token is None:
            token = weights.notes.get("name", path.stem) if key in _NAMELESS else key
    if len(shape) not in (1, 2) or 0 in shape or shape[-1] != width:
        raise _error(
            f"{path.name} is {' × '.join(map(str, shape)) or 'a number'}, the checkpoint's text "
            f"encoder takes vectors of {width}"
        )
    if not token or token != token.strip() or not token.isprintable():
        raise ConfigError(
            f"--embedding {text}: {token!r} is no token",
            f"Name one, with no space around it: --embedding {path}=TOKEN.",
        )
    count = shape[0] if len(shape) == 2 else 1
    return Embedding(path, key, (token, *(f"{token}_{i}" for i in range(1, count))))


def _error(message: str) -> ExportError:
    return ExportError(message, _USE, component="embedding", stage="load")
