"""The gate's measuring: a bundle against a file of earlier samples, or two bundles in turns.

In turns is the strong form. Base and new answer as A B B A, so whatever the machine does over
seconds meets both alike; their processes are opened anew every few pairs, so that what one process
has by luck is not taken for its bundle's. Pairs go on only until the interval is narrow enough:
Chow and Robbins' sequential interval of a given width (1965). Its width decides when to stop, never
what it says.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
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
from sd_bench.judgement import PAIRS_A_PROCESS, check_enough, judge_pairs
from sd_bench.latency import WARM_UP, measure_latency
from sd_bench.measurable import measurable_bundle
from sd_bench.sampler_process import SamplerProcess
from sd_engines.errors import ConfigError
from sd_runtime.plan import plan
from sd_runtime.timing import clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import TypeAlias

    from sd_bench.judgement import Criterion, Judgement
    from sd_bench.latency import Sampler
    from sd_bench.measurement import Measurement, Sample, Settings

    TakeSample: TypeAlias = Callable[[], Sample]
    Sides: TypeAlias = tuple[TakeSample, TakeSample]

FIRST_LOOK: Final = 32
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

    ``runs`` None: `usual_runs`. ``on_sample`` is told how many there are.
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
        runs=runs or usual_runs(base),
        on_sample=on_each,
    )
    return compare(base, new, criterion)


def usual_runs(base: Measurement) -> int:
    """How many samples to judge by ``base``: as many as it has, 20 at least."""
    return max(len(base.samples), FEWEST_RUNS)


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
    measured: list[Measurement] = []

    with TemporaryDirectory(prefix="sd-bench-gate-") as folder:

        def opened(side: int) -> SamplerProcess:
            return SamplerProcess(
                (base, new)[side],
                settings,
                python=interpreters[side],
                warm_up=WARM_UP,
                log=Path(folder) / f"{('base', 'new')[side]}.log",
            )

        @contextmanager
        def open_sides(order: tuple[int, int]) -> Iterator[Sides]:
            with ExitStack() as stack:
                processes = {side: stack.enter_context(opened(side)) for side in order}
                yield processes[0].sample, processes[1].sample
                if not measured:  # all are alike: one fingerprint of the machine is enough
                    measured.extend(processes[side].measurement_of(()) for side in (0, 1))

        samples = take_turns(open_sides, criterion, max_pairs=max_pairs, on_pair=on_pair)
    base_measured, new_measured = (
        replace(measurement, samples=tuple(taken))
        for measurement, taken in zip(measured, samples, strict=True)
    )
    return compare(base_measured, new_measured, criterion, paired=True)


def take_turns(
    open_sides: Callable[[tuple[int, int]], AbstractContextManager[Sides]],
    criterion: Criterion,
    *,
    max_pairs: int = MAX_PAIRS,
    on_pair: Callable[[int, Judgement | None], None] = lambda count, judgement: None,
) -> tuple[list[Sample], list[Sample]]:
    """Samples of both as A B B A, in pairs by index, until precise or ``max_pairs``.

    ``open_sides`` makes what answers for the base and the new one, for `PAIRS_A_PROCESS` pairs; it
    is told which to open first, 0 for the base, and that one answers first: each as often as the
    other, since what a process answers first is slower. Precise is `Judgement.precise`; it is
    looked at after 32 pairs and then at every quarter more. All samples' ``started_s`` count from
    the first one. `ConfigError` for too few pairs.
    """
    _check_pairs(max_pairs)
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    looks = set(_looks(max_pairs))
    began: float | None = None
    order = (0, 1)
    for first in range(0, max_pairs, PAIRS_A_PROCESS):
        with open_sides(order) as sides:
            began = clock() if began is None else began
            for count in range(first + 1, first + 1 + PAIRS_A_PROCESS):
                for side in order if count % 2 else order[::-1]:
                    started_s = clock() - began
                    samples[side].append(replace(sides[side](), started_s=started_s))
                if count == 1:  # the first tells whether the stage is there at all
                    _both_ms(samples, criterion)
                judgement = None
                if count in looks:
                    judgement = judge_pairs(*_both_ms(samples, criterion), criterion)
                on_pair(count, judgement)
        if judgement is not None and judgement.precise:
            break
        order = order[::-1]
    return samples


def _both_ms(
    samples: tuple[list[Sample], list[Sample]], criterion: Criterion
) -> tuple[list[float], list[float]]:
    base, new = samples
    return stage_ms(base, criterion.stage), stage_ms(new, criterion.stage)


def _check_pairs(max_pairs: int) -> None:
    if max_pairs < FIRST_LOOK or max_pairs % PAIRS_A_PROCESS:
        raise ConfigError(
            f"{max_pairs} pairs",
            f"Allow a multiple of {PAIRS_A_PROCESS}, {FIRST_LOOK} or more: as many are of one "
            "process.",
        )


def _profile(bundle: Path, settings: Settings) -> dict[str, int]:
    """The shapes that ``bundle`` answers ``settings`` with; `ConfigError` where it cannot."""
    return asdict(plan(settings.request(), measurable_bundle(bundle).manifest).profile)


def _looks(max_pairs: int) -> Iterator[int]:
    count = FIRST_LOOK
    while count < max_pairs:
        yield count
        count += count // 4 // PAIRS_A_PROCESS * PAIRS_A_PROCESS
