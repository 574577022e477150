"""The files of a checkpoint: what they weigh, what is in them, and whether anyone touched them."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from sd_export.checkpoint import Checkpoint


def stamps(checkpoint: Checkpoint) -> dict[Path, tuple[int, int] | None]:
    """Size and time of change of every weight file; None for one that is gone."""
    paths = {path for paths in checkpoint.weights.values() for path in paths}
    paths |= {lora.path for lora in checkpoint.loras}
    paths |= {embedding.path for embedding in checkpoint.embeddings}
    found = {path: path.stat() if path.exists() else None for path in paths}
    return {path: stat and (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Size of all weight files."""
    paths = {path for paths in checkpoint.weights.values() for path in paths}
    return sum(path.stat().st_size for path in paths)


def weight_hashes(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """SHA-256 of every weight file, by model; each file is read once."""
    paths = list(dict.fromkeys(path for paths in checkpoint.weights.values() for path in paths))
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = dict(zip(paths, pool.map(file_hash, paths), strict=True))
    return {model: [found[p] for p in files] for model, files in checkpoint.weights.items()}


def additions(checkpoint: Checkpoint) -> dict[str, Any]:
    """What was put into the checkpoint, as `export.json` says it."""
    vaes = {"vae": checkpoint.vae, "preview_vae": checkpoint.preview_vae}
    return {
        "loras": [
            {"file": lora.path.name, "sha256": lora.sha256, "scale": lora.scale}
            for lora in checkpoint.loras
        ],
        "embeddings": [
            {
                "file": e.path.name,
                "sha256": file_hash(e.path),
                "text_encoder": e.text_encoder,
                "tokens": e.tokens,
            }
            for e in checkpoint.embeddings
        ],
        **{
            name: vae and {"source": vae.source, "revision": vae.revision}
            for name, vae in vaes.items()
        },
    }


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file right in ``folder``, by name."""
    return {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.is_file()}


def file_hash(path: Path) -> str:
    """SHA-256 of ``path`` in lower-case hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
