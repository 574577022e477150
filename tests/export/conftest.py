"""Checkpoints and one exported bundle, made once for all tests of the exporter."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from sd_export import ExportReport


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the Hub has them: old tokenizer, old key names, a safety checker."""
    from tiny import make_checkpoint

    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "tiny",
        safety_checker=True,
        tokenizer="vocab.json",
        text_model_prefix=True,
    )


@pytest.fixture(scope="session")
def of_2022(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``smallest`` with a scheduler's config as they were before diffusers corrected them."""
    from tiny import change_json

    old = shutil.copytree(smallest, tmp_path_factory.mktemp("of_2022") / "old")
    changes = {"_class_name": "DDIMScheduler", "clip_sample": True, "steps_offset": 0}
    change_json(old / "scheduler" / "scheduler_config.json", **changes)
    return old


@pytest.fixture(scope="session")
def report_of_2022(of_2022: Path) -> ExportReport:
    """``of_2022``, exported beside it. Read it; do not change it."""
    import sd_export

    return sd_export.export(of_2022, of_2022.parent / "bundle")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the shapes of ``smallest``, with other weights."""
    from tiny import make_smallest_checkpoint

    return make_smallest_checkpoint(tmp_path_factory.mktemp("other") / "other", seed=9)


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random `AutoencoderTiny` for the latents of ``smallest``."""
    from tiny import make_tiny_vae

    return make_tiny_vae(tmp_path_factory.mktemp("taesd") / "taesd")


@pytest.fixture(scope="session")
def bundle_of_two_vaes(
    smallest: Path, other: Path, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """``smallest`` with the VAE of ``other``, and with ``tiny_vae`` for previews."""
    from sd_export.cli import main

    bundle = tmp_path_factory.mktemp("two_vaes") / "bundle"
    options = ["--vae", str(other / "vae"), "--preview-vae", str(tiny_vae), "--quiet"]
    options += ["--backend", "onnxruntime"]
    assert main(["--model", str(smallest), "--output", str(bundle), *options]) == 0
    return bundle


@pytest.fixture(scope="session")
def single_file_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of v1's own depth whose shapes follow v1's fixed sizes."""
    from tiny import make_checkpoint

    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "v1",
        block_out_channels=(32, 32, 64, 64),
        vae_block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_heads=8,
        norm_num_groups=32,
    )


@pytest.fixture(scope="session")
def report(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """``checkpoint``, exported for both CPU backends. Read it; do not change it."""
    import sd_export

    output = tmp_path_factory.mktemp("bundle") / "bundle"
    return sd_export.export(checkpoint, output, backends=("onnxruntime", "openvino"))
