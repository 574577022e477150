"""A checkpoint in the layout of v1 repositories on the Hub, which every peer's version reads.

transformers 5 writes ``tokenizer.json`` alone and drops the ``text_model.`` prefix of the text
encoder's keys; transformers 4, which some peers pin, finds no tokenizer there and leaves every
weight of the text encoder random.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

_WEIGHTS: Final = Path("text_encoder/model.safetensors")
_PREFIX: Final = "text_model."


def checkpoint_folder(model: str) -> Path:
    """The folder of the checkpoint that ``model`` names: a path, or an id on the Hub.

    `ConfigError` for a single file, which most peers do not read; `ExportError` as
    `sd_export.source.find_checkpoint` raises it.
    """
    from sd_export.source import find_checkpoint

    checkpoint = find_checkpoint(model)
    if checkpoint.single_file:
        raise ConfigError(
            f"{model} is one file in the original layout, which not every peer reads",
            "Name a folder in the diffusers layout, or an id on the Hub.",
        )
    return checkpoint.weights["unet"][0].parent.parent.resolve()


def stage_checkpoint(source: Path, folder: Path) -> None:
    """Make ``folder`` a copy of the checkpoint at ``source``, in the layout of the Hub's.

    What needs no change is a link. Weights keep their values and dtypes.
    """
    for path in _files(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.relative_to(source) == _WEIGHTS:
            _stage_text_encoder(path, target)
        else:
            target.symlink_to(path.resolve())
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "vocab.json").exists():
        _write_vocabulary(tokenizer)


def checkpoint_key(folder: Path) -> str:
    """Hexadecimal digits that change with any file of ``folder``: names, sizes and times."""
    digest = hashlib.sha256()
    for path in _files(folder):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _stage_text_encoder(path: Path, target: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as weights:
        prefixed = all(name.startswith(_PREFIX) for name in weights.keys())  # noqa: SIM118
    if prefixed:
        target.symlink_to(path.resolve())
        return
    tensors = {f"{_PREFIX}{name.removeprefix(_PREFIX)}": t for name, t in load_file(path).items()}
    save_file(tensors, target, metadata={"format": "pt"})


def _write_vocabulary(tokenizer: Path) -> None:
    """Write the ``vocab.json`` and ``merges.txt`` that `tokenizer.json` holds."""
    model: dict[str, Any] = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))["model"]
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
