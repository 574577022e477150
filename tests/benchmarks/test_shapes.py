"""The shipped checkpoint: small, complete, and still itself after the export."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sd_bench.cli import cli
from sd_bench.quality import fault_kinds, measure_quality
from sd_runtime import Pipeline

CHECKPOINT = Path(__file__).parents[2] / "benchmarks" / "shapes" / "checkpoint"


def test_weights_are_half_precision_and_at_most_20_megabytes() -> None:
    from safetensors import safe_open

    files = sorted(CHECKPOINT.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["text_encoder", "unet", "vae"]
    assert sum(file.stat().st_size for file in files) <= 20e6
    for file in files:
        with safe_open(file, framework="np") as weights:
            arrays = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
        assert all(np.isfinite(a).all() for a in arrays)
        assert {a.dtype for a in arrays if a.dtype.kind == "f"} == {np.dtype(np.float16)}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_obeys_after_the_export(shapes_bundle: Path, backend: str) -> None:
    # A guard against a broken export or sampler, not the score, which the model card states.
    with Pipeline.load(shapes_bundle, backend=backend) as pipeline:
        score = measure_quality(
            pipeline,
            {"num_inference_steps": 12, "guidance_scale": 3.0, "scheduler": "dpm++_2m_karras"},
            captions=12,
        )
    assert score.share >= 0.75, fault_kinds(score)


def test_the_few_step_lora_draws_at_once(shapes_bundle: Path) -> None:
    """In one step 23 of these 24 captions are right, 21 without it."""
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "scheduler": "lcm"}
    lora = str(CHECKPOINT.parent / "few_step_lora" / "pytorch_lora_weights.safetensors")
    with Pipeline.load(shapes_bundle, backend="onnxruntime", loras=[lora]) as pipeline:
        score = measure_quality(pipeline, options, captions=24)
        pipeline.use_loras([])
        without = measure_quality(pipeline, options, captions=24)
    assert score.share >= 0.85, fault_kinds(score)
    assert score.share > without.share


def test_quality_command_reports_and_saves_pictures(shapes_bundle: Path, tmp_path: Path) -> None:
    arguments = [str(shapes_bundle), "--captions", "2", "--num-inference-steps", "3"]
    done = CliRunner().invoke(
        cli, ["quality", *arguments, "--pictures", str(tmp_path)], catch_exceptions=False
    )
    assert "of 2 held-out captions fully right" in done.stdout
    assert len(list(tmp_path.glob("*.png"))) == 2
