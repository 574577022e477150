"""What a checkpoint was when it was read: hashes of all of it that a bundle depends on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_engines.errors import ExportError
from sd_export.checkpoint_files import additions, folder_hashes, stamps, weight_hashes

if TYPE_CHECKING:
    from sd_export.checkpoint import Checkpoint


class CheckpointHashes:
    """``weights`` by model, and of what was added to it ``additions``, as a bundle records them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stamps = stamps(checkpoint)
        self.weights = weight_hashes(checkpoint)
        self.additions = additions(checkpoint)

    @property
    def made_of(self) -> dict[str, Any]:
        """All but the weights that any graph depends on, this code among it."""
        checkpoint = self._checkpoint
        return {
            "code": folder_hashes(Path(__file__).parent),
            "configs": checkpoint.configs,
            **self.additions,
            "controlnets": checkpoint.controlnets,
            "max_prompt_chunks": checkpoint.max_prompt_chunks,
        }

    @property
    def described(self) -> dict[str, Any]:
        """What a bundle depends on besides."""
        checkpoint = self._checkpoint
        return {
            "defaults": asdict(checkpoint.defaults),
            "license": checkpoint.license,
            "licenses": [path.read_text("utf-8", "replace") for path in checkpoint.licenses],
            "revision": checkpoint.revision,
            "source": checkpoint.source,
            "force_zeros_for_empty_prompt": checkpoint.force_zeros_for_empty_prompt,
            "max_noise_level": checkpoint.max_noise_level,
            "tokenizers": [folder_hashes(path) for path in checkpoint.tokenizers.values()],
            "weights": self.weights,
        }

    def check_unchanged(self) -> None:
        """`ExportError` where someone wrote to the checkpoint since it was hashed."""
        if stamps(self._checkpoint) != self._stamps:
            raise ExportError(
                "its files were changed while they were being read",
                "Run the same command again when whatever writes them is done.",
                component="checkpoint",
                stage="load",
            )
