"""Commands one after the other: a failure is told and outlived, and what has ended is kept."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from scripts import load_script

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


@pytest.fixture
def errands(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which is no part of a package, in a checkout without changes."""
    module = load_script("errands")
    here = module.environment() | {"commit": "c0ffee"}
    monkeypatch.setattr(module, "environment", lambda: here)
    return module


def python(errands: ModuleType, name: str, code: str, **more: Any) -> Any:
    return errands.Errand(name=name, command=(sys.executable, "-c", code), **more)


def run(errands: ModuleType, folder: Path, *asked: Any, **more: Any) -> Any:
    return errands.run(asked, folder / "report.json", cwd=folder, **more)


def test_a_failure_is_told_and_what_does_not_need_it_goes_on(
    errands: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "figure.json"
    outcomes = run(
        errands,
        tmp_path,
        python(errands, "broken", "raise SystemExit('no such card')"),
        python(errands, "after", "print('never')", needs=("broken",)),
        python(errands, "file", f"open({str(written)!r}, 'w').write('[42]')", result=written),
        python(errands, "line", "print('so many:'); print('[43]')", prints_json=True),
        python(errands, "neither", "print('Hello')", prints_json=True),
    )
    *first, last = outcomes
    assert [(o.exit_code, o.said, o.result) for o in first] == [
        (1, "no such card", None),
        (None, "needs broken", None),
        (0, "", [42]),
        (0, "so many:\n[43]", [43]),
    ]
    assert (last.exit_code, last.result) == (1, None)
    assert last.said.startswith("Hello\nit wrote no result: ")
    assert "no such card" in (tmp_path / "broken.log").read_text()
    assert "not run" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [each["result"] for each in report["errands"]] == [None, None, [42], [43], None]
    assert report["environment"]["python"]


def test_what_has_ended_is_written_whatever_comes(errands: ModuleType, tmp_path: Path) -> None:
    read = "print(open('report.json').read())"
    first, second = python(errands, "first", "print(42)"), python(errands, "second", read)
    assert '"said": "42"' in run(errands, tmp_path, first, second)[1].said


def counting(errands: ModuleType, folder: Path, name: str, **more: Any) -> Any:
    """Writes down that it ran; fails where a file "no" lies in ``folder``."""
    code = f"open('ran', 'a').write('{name} '); import os; raise SystemExit(os.path.exists('no'))"
    return python(errands, name, code, **more)


def test_what_has_succeeded_is_kept(errands: ModuleType, tmp_path: Path) -> None:
    good, bad = counting(errands, tmp_path, "good"), python(errands, "bad", "raise SystemExit(1)")
    after = counting(errands, tmp_path, "after", needs=("good",))
    run(errands, tmp_path, good, bad, minutes=1)
    outcomes = run(errands, tmp_path, good, bad, after)
    assert [outcome.state for outcome in outcomes] == ["kept", "exit 1", "done"]
    assert (tmp_path / "ran").read_text() == "good after "
    assert [outcome.state for outcome in run(errands, tmp_path, good, after)] == ["kept", "kept"]


def test_what_needs_what_is_run_again_is_run_again(errands: ModuleType, tmp_path: Path) -> None:
    old, new = python(errands, "model", "print('old')"), python(errands, "model", "print('new')")
    after = counting(errands, tmp_path, "after", needs=("model",))
    run(errands, tmp_path, old, after)
    outcomes = run(errands, tmp_path, new, after)
    assert [outcome.state for outcome in outcomes] == ["done", "done"]
    assert (tmp_path / "ran").read_text() == "after after "


def test_what_comes_later_is_kept_though_time_is_over_before(
    errands: ModuleType, tmp_path: Path
) -> None:
    last = counting(errands, tmp_path, "last")
    run(errands, tmp_path, last)
    endless = python(errands, "endless", "import time; time.sleep(600)")
    outcomes = run(errands, tmp_path, endless, last, minutes=0.01)
    assert outcomes[0].exit_code
    assert outcomes[1].state == "kept"


@pytest.mark.parametrize(
    "change",
    [{"gpu": "another"}, {"commit": "decaf"}, {"commit": "c0ffee+"}, {"numpy": "1.0"}],
    ids=str,
)
def test_nothing_is_kept_of_another_machine_or_program(
    errands: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    good = counting(errands, tmp_path, "good")
    run(errands, tmp_path, good)
    here = errands.environment() | change
    monkeypatch.setattr(errands, "environment", lambda: here)
    assert run(errands, tmp_path, good)[0].state == "done"
    assert run(errands, tmp_path, good)[0].state == ("done" if "+" in str(change) else "kept")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"environment": {}, "errands": [{"a": 1}]}'])
def test_a_damaged_report_keeps_nothing(errands: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    assert run(errands, tmp_path, counting(errands, tmp_path, "good"))[0].state == "done"


def test_when_the_time_is_over_nothing_more_is_run(errands: ModuleType, tmp_path: Path) -> None:
    code = "import time; print('begun', flush=True); time.sleep(600)"
    asked = python(errands, "endless", code), python(errands, "late", "print('never')")
    endless, late = run(errands, tmp_path, *asked, minutes=0.02)
    assert endless.exit_code
    assert endless.said.endswith("stopped: the time is over")
    assert (late.exit_code, late.said) == (None, "the 0.02 minutes are over")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [each["name"] for each in report["errands"]] == ["endless", "late"]


def test_figures_of_the_processor_do_not_pass_for_a_gpus(
    errands: ModuleType, tmp_path: Path
) -> None:
    figure = tmp_path / "figure.json"
    asked = []
    for name, used in (("fell back", 0), ("ran", 1)):
        code = f"open({str(figure)!r}, 'w').write('{{\"gpu_memory_bytes\": {used}}}')"
        asked.append(python(errands, name, code, result=figure, on_gpu=True))
    fell_back, ran = run(errands, tmp_path, *asked)
    assert (fell_back.exit_code, ran.exit_code) == (1, 0)
    assert "these are the processor's figures" in fell_back.said
