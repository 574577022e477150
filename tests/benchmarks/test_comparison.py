"""What may be compared, and what is refused with a word on what differs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from latency_noise import measurement
from sd_bench.comparison import check_comparable, compare, stage_ms
from sd_bench.judgement import Criterion, Verdict
from sd_bench.measurement import Settings
from sd_engines.errors import ConfigError

CRITERION = Criterion(allowed_regression=0.05)


def test_every_stage_is_judged_and_one_decides() -> None:
    comparison = compare(measurement(), measurement(slowdown=1.2, seed=1), CRITERION)
    assert list(comparison.stages) == ["tokenize", "unet", "unet_step", "png", "total"]
    assert comparison.judgement is comparison.stages["total"]
    assert comparison.judgement.verdict is Verdict.FAIL
    assert comparison.stages["png"].ratio.value == 1.0
    png = replace(CRITERION, stage="png")
    passed = compare(measurement(), measurement(slowdown=1.2, seed=1), png)
    assert passed.judgement.verdict is Verdict.PASS


def test_a_step_is_each_samples_median_step() -> None:
    one = measurement()
    assert stage_ms(one.samples, "unet_step") == pytest.approx(
        [0.3 * sample.stages_ms["total"] for sample in one.samples]
    )


def test_a_stage_must_be_in_every_sample() -> None:
    one = measurement()
    del one.samples[7].stages_ms["png"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="no stage 'png'") as error:
        stage_ms(one.samples, "png")
    assert "unet_step" in error.value.hint
    with pytest.raises(ConfigError, match="no stage 'scheduler_step'"):
        compare(measurement(), measurement(), replace(CRITERION, stage="scheduler_step"))


def test_another_environment_is_refused_and_named() -> None:
    base = measurement()
    foreign = replace(base, environment={**base.environment, "cpu": "another"})
    with pytest.raises(ConfigError, match="cpu 'one', now 'another'") as error:
        compare(base, foreign, CRITERION)
    assert error.value.exit_code == 2
    assert "sd-bench gate" in error.value.hint
    in_turns = compare(base, foreign, CRITERION, paired=True)
    assert in_turns.notes == ("cpu 'one', now 'another'",)


def test_other_settings_and_shapes_are_refused_and_named() -> None:
    base = measurement()
    with pytest.raises(ConfigError, match="num_inference_steps 20, now 25"):
        check_comparable(base, replace(base, settings=Settings(num_inference_steps=25)))
    with pytest.raises(ConfigError, match="height 128, now 512"):
        check_comparable(base, replace(base, profile={**base.profile, "height": 512}))
    check_comparable(base, replace(base, profile={}))  # a file from before profiles were noted


def test_what_is_no_reason_to_refuse_is_noted() -> None:
    base = measurement()
    new = replace(
        base,
        fingerprint="e" * 64,
        backend="onnxruntime",
        environment={**base.environment, "commit": "bbb", "load_average": "9.0 9.0 9.0"},
    )
    notes = " / ".join(compare(base, new, CRITERION).notes)
    assert "openvino fp32, the new one on onnxruntime fp32" in notes
    assert "different graphs" in notes
    assert "commit 'aaa', now 'bbb'" in notes
    assert "load 9.0 on 2 cores with the new one" in notes
    assert "two runs apart" in notes
    assert compare(base, base, CRITERION, paired=True).notes == ()
