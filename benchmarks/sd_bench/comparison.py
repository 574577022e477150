"""Two measurements side by side: whether they may be compared at all, and what each stage says."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from sd_bench.environment import ABSENT, difference
from sd_bench.judgement import judge_apart, judge_pairs
from sd_bench.measurement import STEPS
from sd_engines.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sd_bench.judgement import Criterion, Judgement
    from sd_bench.measurement import Measurement, Sample

_PROGRAM: Final = ("sd-toolkit", "commit")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """``judgement`` is the gate's; ``stages`` judges every stage alike, for reading only.

    ``notes`` say what differs and is no reason to refuse.
    """

    base: Measurement
    new: Measurement
    judgement: Judgement
    stages: Mapping[str, Judgement]
    notes: tuple[str, ...]


def compare(
    base: Measurement,
    new: Measurement,
    criterion: Criterion,
    *,
    paired: bool = False,
) -> Comparison:
    """Judge ``new`` by ``base``; ``paired`` says that their samples were taken in turns.

    `ConfigError` for measurements that do not compare, a stage that one of them lacks, or too few
    samples.
    """
    check_comparable(base, new, paired=paired)
    judge = judge_pairs if paired else judge_apart
    stages = [name for name in _stages(base.samples) if name in _stages(new.samples)]
    if criterion.stage not in stages:
        raise ConfigError(
            f"no stage {criterion.stage!r} in both measurements", nearest(criterion.stage, stages)
        )
    judgements = {
        stage: judge(
            stage_ms(base.samples, stage),
            stage_ms(new.samples, stage),
            replace(criterion, stage=stage),
        )
        for stage in stages
    }
    return Comparison(
        base=base,
        new=new,
        judgement=judgements[criterion.stage],
        stages=judgements,
        notes=tuple(_notes(base, new, paired=paired)),
    )


def stage_ms(samples: Sequence[Sample], stage: str) -> list[float]:
    """One number per sample: its ``stage``, or the median of its steps where that is a step.

    `ConfigError` for a stage that not every sample has.
    """
    stages = _stages(samples)
    if stage not in stages:
        raise ConfigError(f"no stage {stage!r} in every sample", nearest(stage, stages))
    return [_value_ms(sample, stage) for sample in samples]


def check_comparable(base: Measurement, new: Measurement, *, paired: bool = False) -> None:
    """`ConfigError` that says what differs: environment, settings or the bundles' shapes.

    Those that took turns share their machine; packages that differ are then what is judged.
    """
    if not paired:
        check_environment(base.environment, new.environment)
    settings = _differing(asdict(base.settings), asdict(new.settings))
    for name in ("height", "width"):  # the profile holds what they came to
        settings.pop(name, None)
    if settings:
        raise ConfigError(
            f"measured with other settings: {_words(settings)}",
            "Measure both with the same; sd-bench gate BASE.json BUNDLE takes the baseline's.",
        )
    check_profile(base.profile, new.profile)


def check_environment(base: Mapping[str, str], new: Mapping[str, str]) -> None:
    """`ConfigError` where latencies of the two are not each other's measure."""
    foreign = difference(base, new)
    if foreign:
        raise ConfigError(
            f"the baseline is of another environment: {_words(foreign)}",
            "Measure the base here and now: sd-bench gate BASE_BUNDLE BUNDLE does it in pairs.",
        )


def check_profile(base: Mapping[str, int], new: Mapping[str, int]) -> None:
    """`ConfigError` where the bundles draw other sizes or batches; what one lacks passes."""
    shapes = _differing(
        {name: value for name, value in base.items() if name in new},
        {name: value for name, value in new.items() if name in base},
    )
    if shapes:
        raise ConfigError(
            f"the bundles are built for other shapes: {_words(shapes)}",
            "Compare bundles of one shape; sd-bench scaling shows what a size costs.",
        )


def _differing(
    base: Mapping[str, object], new: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    names = [name for name in {**base, **new} if base.get(name) != new.get(name)]
    return {name: (base.get(name), new.get(name)) for name in names}


def _words(differing: Mapping[str, tuple[object, object]]) -> str:
    return "; ".join(f"{name} {was!r}, now {now!r}" for name, (was, now) in differing.items())


def _stages(samples: Sequence[Sample]) -> list[str]:
    """Stages of which every sample has a positive time, in their order; "total" is the last."""
    names = []
    for name in (name for name in samples[0].stages_ms if name != "total") if samples else ():
        names += [name, *([STEPS[name]] if name in STEPS else [])]
    return [
        name
        for name in [*names, "total"]
        if all(0 < _value_ms(sample, name) < math.inf for sample in samples)
    ]


def _value_ms(sample: Sample, stage: str) -> float:
    """NaN where the sample has none."""
    if stage in STEPS.values():
        steps = sample.unet_steps_ms if stage == "unet_step" else sample.scheduler_steps_ms
        return float(np.median(steps)) if steps else math.nan
    return sample.stages_ms.get(stage, math.nan)


def _notes(base: Measurement, new: Measurement, *, paired: bool) -> list[str]:
    notes = []
    ran = [f"{side.backend} {side.precision}" for side in (base, new)]
    if ran[0] != ran[1]:
        notes.append(f"the base ran on {ran[0]}, the new one on {ran[1]}")
    if base.fingerprint != new.fingerprint:
        notes.append("the bundles hold different graphs, so their pictures may differ as well")
    program = ({n: side.environment.get(n, ABSENT) for n in _PROGRAM} for side in (base, new))
    changes = (difference(base.environment, new.environment), _differing(*program))
    notes += [_words(found) for found in changes if found]
    if not paired:
        notes.append(
            "two runs apart: what the machine does differently between them counts as a change; "
            "sd-bench gate BASE_BUNDLE BUNDLE takes turns"
        )
    for side, measurement in (("base", base), ("new one", new)):
        load = float((measurement.environment.get("load_average") or "0").split()[0])
        cores = int(measurement.environment.get("cores") or 1)
        if load > 1.5 * cores:
            notes.append(f"a busy machine: load {load:.1f} on {cores} cores with the {side}")
    return notes
