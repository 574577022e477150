"""A scheduler in bundle.json that nothing can be drawn with is the bundle's fault, by name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from sampler_oracle import V1_CONFIG
from sd_engines.errors import BundleError
from sd_runtime.scheduler_check import check_schedulers
from tiny_onnx import MODEL, make_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines.manifest import Manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_manifest(tmp_path)


def _with(manifest: Manifest, **model: Any) -> Manifest:
    return replace(manifest, model=replace(MODEL, **model))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "no such scheduler"),
        ("_class_name", "EDMEulerScheduler"),
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "even"),
        ("trained_betas", [0.5]),
        ("beta_start", 1),
        ("beta_end", 2),
        ("beta_end", 0),
    ],
)
def test_a_scheduler_of_no_sampler(manifest: Manifest, key: str, value: object) -> None:
    check_schedulers(_with(manifest, scheduler=V1_CONFIG))
    with pytest.raises(BundleError, match=r"bundle.json: model.scheduler: ") as caught:
        check_schedulers(_with(manifest, scheduler={**V1_CONFIG, key: value}))
    assert "sd-export --model" in caught.value.hint
    assert "scheduler_config.json" not in str(caught.value)


def test_the_scheduler_of_small_pictures(manifest: Manifest) -> None:
    config = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear"}
    check_schedulers(_with(manifest, low_res_scheduler=config, max_noise_level=350))
    for changed, most in (({**config, "beta_end": -1}, 350), (config, 1000)):
        with pytest.raises(BundleError, match=r"bundle.json: model.low_res_scheduler: "):
            check_schedulers(_with(manifest, low_res_scheduler=changed, max_noise_level=most))
