"""What a bundle holds beside graphs and engines: its tokenizers, scheduler and licence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sd_engines.bundle import hash_files
from sd_engines.errors import ExportError
from sd_export.license import copy_license

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines.bundle import FileEntry
    from sd_export.checkpoint import Checkpoint


def write_small_files(checkpoint: Checkpoint, bundle: Path) -> dict[str, FileEntry]:
    """Write tokenizers, scheduler config and licence to the folder ``bundle``; their entries.

    `ConfigError` or `ExportError`, before any graph is made, where the runtime cannot use them.
    """
    from sd_export.load import load_tokenizer
    from sd_runtime.pipeline import TOKENIZER_OF
    from sd_runtime.scheduler_config import pipeline_scheduler_config
    from sd_runtime.table import compile_table

    config = pipeline_scheduler_config(checkpoint.configs["scheduler"], family=checkpoint.family)
    compile_table(config, num_inference_steps=checkpoint.defaults.num_inference_steps)
    names = ["scheduler/scheduler_config.json"]
    for encoder in checkpoint.text_encoders:
        tokenizer = load_tokenizer(checkpoint, encoder)
        known = int(checkpoint.configs[encoder]["vocab_size"])
        known += sum(len(embedding.tokens) for embedding in checkpoint.embeddings_of(encoder))
        path = bundle / TOKENIZER_OF[encoder]
        if tokenizer.get_vocab_size() > known:
            raise ExportError(
                f"has {tokenizer.get_vocab_size()} tokens, the text encoder knows {known}",
                "They are of different models; download the checkpoint again.",
                component=path.parent.name,
                stage="load",
            )
        path.parent.mkdir(exist_ok=True)
        path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        names.append(TOKENIZER_OF[encoder])
    (bundle / "scheduler").mkdir(exist_ok=True)
    scheduler = json.dumps(dict(checkpoint.configs["scheduler"]), indent=2)
    (bundle / "scheduler" / "scheduler_config.json").write_text(scheduler + "\n")
    return hash_files(bundle, names + copy_license(checkpoint, bundle))
