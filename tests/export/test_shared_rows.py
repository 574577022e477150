"""What a picture's rows share is computed once, and nothing comes out otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sd_bench.work import count_work
from sd_engines.spec import BATCH, PICTURES, Profile
from sd_export.borders import borders
from sd_export.load import load_model
from sd_export.onnx_export import MODEL_FILE, save, trace
from sd_export.source import find_checkpoint
from sd_export.wrappers import wrap
from tiny import make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from sd_export.checkpoint import Checkpoint

PROFILE = Profile(batch_size=2, height=64, width=64, vae_scale_factor=8)


@dataclass(frozen=True)
class Traced:
    """A UNet's graph, and diffusers' own UNet."""

    path: Path
    unet: torch.nn.Module


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    folder = tmp_path_factory.mktemp("shared")
    checkpoint = find_checkpoint(str(make_checkpoint(folder / "checkpoint")))
    return Traced(trace_unet(checkpoint, folder / "unet"), load_model(checkpoint, "unet"))


def trace_unet(checkpoint: Checkpoint, folder: Path) -> Path:
    module = wrap("unet", load_model(checkpoint, "unet"), checkpoint=checkpoint, profile=PROFILE)
    inputs, outputs = borders("unet", checkpoint=checkpoint, profile=PROFILE)
    save(trace(module, component="unet", inputs=inputs, outputs=outputs), folder)
    return folder / MODEL_FILE


@pytest.mark.parametrize(("pictures", "rows"), [(1, 1), (1, 2), (2, 2), (2, 4), (2, 6)])
def test_it_gives_what_diffusers_gives_row_by_row(traced: Traced, pictures: int, rows: int) -> None:
    rng = np.random.default_rng(rows)
    sample = rng.standard_normal((pictures, 4, 8, 8), dtype=np.float32)
    timestep = np.array([981, 21], np.float32)[:pictures]
    embeds = rng.standard_normal((rows, 77, 32), dtype=np.float32)
    session = onnxruntime.InferenceSession(traced.path)
    inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": embeds}
    (found,) = session.run(None, inputs)
    repeats = rows // pictures
    with torch.inference_mode():
        wanted = traced.unet(
            torch.from_numpy(np.tile(sample, (repeats, 1, 1, 1))),
            torch.from_numpy(np.tile(timestep, repeats)),
            torch.from_numpy(embeds),
        ).sample.numpy()
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_what_comes_before_the_prompt_is_computed_once(traced: Traced) -> None:
    once, twice = (
        count_work(traced.path, dimensions={BATCH: 2, PICTURES: pictures}).flops
        for pictures in (1, 2)
    )
    graph = onnx.load(traced.path, load_external_data=False).graph
    axes = {v.name: v.type.tensor_type.shape.dim[0].dim_param for v in graph.value_info}
    first, second = [node for node in graph.node if node.op_type == "Attention"][:2]
    assert axes[first.output[0]] == PICTURES, "the self-attention"
    assert axes[second.output[0]] == BATCH, "what looks at the prompt"
    assert once < 0.97 * twice
    tiles = [node for node in graph.node if node.op_type == "Tile"]
    assert len(tiles) <= 6, "and not one for each layer's share of the timestep"


def test_sdxl_shares_nothing(tmp_path: Path) -> None:
    from tiny_xl import make_xl_checkpoint

    checkpoint = find_checkpoint(str(make_xl_checkpoint(tmp_path / "xl")))
    inputs, _ = borders("unet", checkpoint=checkpoint, profile=PROFILE)
    assert {spec.shape[0] for spec in inputs} == {BATCH}
