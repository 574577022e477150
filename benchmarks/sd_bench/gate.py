"""The gate's measuring: a bundle against a file of earlier samples, or two bundles in turns.

In turns is the strong form. Base and new answer as A B B A, so whatever the machine does over
seconds meets both alike, and their pairs go on only until the interval is narrow enough: Chow and
Robbins' sequential interval of a given width (1965). Its width decides when to stop, never what it
says.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from sd_bench.comparison import (
    Comparison,
    check_environment,
    check_profile,
    compare,
    stage_ms,
)
from sd_bench.environment import environment
from sd_bench.judgement import ABBA, check_enough, judge_pairs
from sd_bench.latency import WARM_UP, measure_latency
from sd_bench.measurable import measurable_bundle
from sd_bench.sampler_process import SamplerProcess
from sd_engines.errors import ConfigError
from sd_runtime.plan import plan
from sd_runtime.timing import clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sd_bench.judgement import Criterion, Judgement
    from sd_bench.latency import Sampler
    from sd_bench.measurement import Measurement, Sample, Settings

FIRST_LOOK: Final = 24
MAX_PAIRS: Final = 240
FEWEST_RUNS: Final = 20


def gate_by_file(
    base: Measurement,
    bundle: Path,
    criterion: Criterion,
    *,
    runs: int | None = None,
    on_sample: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """Measure ``bundle`` afresh with the settings of ``base``, then judge.

    ``runs`` None: as many as the base has, 20 at least. ``on_sample`` is told how many there are.
    `ConfigError`, before anything is measured, where ``base`` is foreign to this machine or
    bundle, lacks the stage or has too few samples; and as `measure_latency` raises.
    """
    check_enough(len(base.samples))
    check_environment(base.environment, environment())
    check_profile(base.profile, _profile(bundle, base.settings))
    stage_ms(base.samples, criterion.stage)
    counted = 0

    def on_each(sampler: Sampler, sample: Sample) -> None:
        nonlocal counted
        counted += 1
        on_sample(counted)

    new = measure_latency(
        bundle,
        base.settings,
        runs=runs or max(len(base.samples), FEWEST_RUNS),
        on_sample=on_each,
    )
    return compare(base, new, criterion)


def gate_in_turns(
    base: Path,
    new: Path,
    criterion: Criterion,
    *,
    settings: Settings,
    base_python: Path | None = None,
    max_pairs: int = MAX_PAIRS,
    on_pair: Callable[[int, Judgement | None], None] = lambda count, judgement: None,
) -> Comparison:
    """Open both bundles, each in its own process, let them answer in turns, then judge the pairs.

    ``base_python`` is the interpreter that runs the base: another version of the toolkit or of a
    backend; None is this one. ``on_pair`` is told how many pairs there are, and the judgement
    where one was made. Raises `BackendError` with the words of a side that fails, and
    `ConfigError` for bundles of other shapes or settings that they cannot take.
    """
    _check_pairs(max_pairs)
    check_profile(_profile(base, settings), _profile(new, settings))
    interpreters = (sys.executable if base_python is None else base_python, sys.executable)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="sd-bench-gate-")))
        base_side, new_side = (
            stack.enter_context(
                SamplerProcess(
                    bundle,
                    settings,
                    python=python,
                    warm_up=WARM_UP,
                    log=folder / f"{name}.log",
                )
            )
            for name, bundle, python in zip(("base", "new"), (base, new), interpreters, strict=True)
        )
        base_samples, new_samples = take_turns(
            base_side.sample,
            new_side.sample,
            criterion,
            max_pairs=max_pairs,
            on_pair=on_pair,
        )
        measured = (base_side.measurement_of(base_samples), new_side.measurement_of(new_samples))
    return compare(*measured, criterion, paired=True)


def take_turns(
    base: Callable[[], Sample],
    new: Callable[[], Sample],
    criterion: Criterion,
    *,
    max_pairs: int = MAX_PAIRS,
    on_pair: Callable[[int, Judgement | None], None] = lambda count, judgement: None,
) -> tuple[list[Sample], list[Sample]]:
    """Samples of both as A B B A, in pairs by index, until precise or ``max_pairs``.

    Precise is `Judgement.precise`; it is looked at after 24 pairs and then at every quarter more.
    All samples' ``started_s`` count from the first one. `ConfigError` for too few pairs.
    """
    _check_pairs(max_pairs)
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    looks = set(_looks(max_pairs))
    began = clock()
    for count in range(1, max_pairs + 1):
        turns = [(base, sides[0]), (new, sides[1])]
        for take, samples in turns if count % 2 else reversed(turns):
            started_s = clock() - began
            samples.append(replace(take(), started_s=started_s))
        judgement = None
        if count == 1 or count in looks:  # the first tells whether the stage is there at all
            base_ms, new_ms = (stage_ms(samples, criterion.stage) for samples in sides)
        if count in looks:
            judgement = judge_pairs(base_ms, new_ms, criterion)
        on_pair(count, judgement)
        if judgement is not None and judgement.precise:
            break
    return sides


def _check_pairs(max_pairs: int) -> None:
    if max_pairs < FIRST_LOOK or max_pairs % ABBA:
        raise ConfigError(f"{max_pairs} pairs", f"Allow an even number, {FIRST_LOOK} or more.")


def _profile(bundle: Path, settings: Settings) -> dict[str, int]:
    """The shapes that ``bundle`` answers ``settings`` with; `ConfigError` where it cannot."""
    return asdict(plan(settings.request(), measurable_bundle(bundle).manifest).profile)


def _looks(max_pairs: int) -> Iterator[int]:
    count = FIRST_LOOK
    while count < max_pairs:
        yield count
        count += max(ABBA, count // 4 // ABBA * ABBA)
