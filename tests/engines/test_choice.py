"""fastest_engine: the fastest that was measured here, at one precision, remembered."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from sd_engines import choice, open_engine
from sd_engines.backends import onnxruntime_package
from sd_engines.backends.onnxruntime import LEAN
from sd_engines.backends.openvino import OpenVinoEngine
from sd_engines.bundle import Bundle, EngineEntry, portable_entry
from sd_engines.choice import fastest_engine
from sd_engines.engine import listed_engines
from sd_engines.errors import BackendError, BundleError, ConfigError
from tiny_onnx import PROFILE, int8_engine, needs, stale_plan

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines.spec import Precision

needs("onnxruntime")
needs("openvino")

BINDINGS = {"onnxruntime": "OnnxRuntimeBinding", "openvino": "OpenVinoBinding"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is remembered; empty, and not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sd-toolkit"


def slow_down(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Let every run of ``backend`` take 20 ms more: the graph alone takes well below 1 ms."""
    binding = getattr(import_module(f"sd_engines.backends.{backend}"), BINDINGS[backend])
    run = binding.run

    def slow_run(self: object) -> None:
        time.sleep(0.02)
        run(self)

    monkeypatch.setattr(binding, "run", slow_run)


def backend_of(bundle: Bundle, *, threads: int | None = 1, runs: int | None = None) -> str | None:
    engine = fastest_engine(bundle, "unet", threads=threads, runs=runs)
    return None if engine is None else engine.backend


def with_engines(bundle: Bundle, *engines: EngineEntry) -> Bundle:
    return Bundle(bundle.path, replace(bundle.manifest, engines=engines))


def portable(
    bundle: Bundle, backend: str, precision: Precision, *, target: str = "cpu"
) -> EngineEntry:
    unet = bundle.manifest.components["unet"]
    return portable_entry(
        "unet", unet, PROFILE, backend, version="1", target=target, precision=precision
    )


@pytest.mark.parametrize(("slow", "fast"), [tuple(BINDINGS), tuple(BINDINGS)[::-1]])
def test_the_fastest_is_taken_and_remembered(
    tiny_bundle: Bundle,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    slow: str,
    fast: str,
) -> None:
    caplog.set_level(logging.INFO, logger="sd_engines.choice")
    with monkeypatch.context() as patch:
        slow_down(patch, slow)
        assert backend_of(tiny_bundle) == fast
    assert caplog.text.count("Measuring once") == 1
    (file,) = cache.iterdir()
    memory = json.loads(file.read_text())
    runs_ms = {key: pace["run_ms"] for key, pace in memory["paces"].items()}
    keys = {entry.key: entry.backend for entry in tiny_bundle.manifest.engines}
    assert keys[min(runs_ms, key=runs_ms.__getitem__)] == fast
    assert max(runs_ms.values()) >= 20 > min(runs_ms.values())

    slow_down(monkeypatch, fast)  # measured again, it would lose
    assert backend_of(tiny_bundle) == fast
    assert caplog.text.count("Measuring once") == 1
    engine = fastest_engine(tiny_bundle, "unet", threads=1)
    with open_engine(tiny_bundle, "unet", prefer=engine) as opened:
        assert opened.entry == engine


def test_a_few_runs_go_to_what_opens_sooner(
    tiny_bundle: Bundle,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of two that are slow, one to run and one to open, a known number of runs decides."""
    caplog.set_level(logging.INFO, logger="sd_engines.choice")
    slow_down(monkeypatch, "onnxruntime")
    compile_ = OpenVinoEngine._compile

    def slow_compile(self: OpenVinoEngine, rows: tuple[int, int]) -> Any:
        time.sleep(0.4)
        return compile_(self, rows)

    monkeypatch.setattr(OpenVinoEngine, "_compile", slow_compile)
    assert [backend_of(tiny_bundle, runs=runs) for runs in (1, 1000, None)] == [
        "onnxruntime",
        "openvino",
        "openvino",
    ]
    assert caplog.text.count("Measuring once") == 1


def test_a_remembered_choice_imports_only_the_winner(tiny_bundle: Bundle, cache: Path) -> None:
    fast = backend_of(tiny_bundle)
    code = (
        "import sys; from sd_engines.bundle import open_bundle; "
        "from sd_engines.choice import fastest_engine; "
        "fastest_engine(open_bundle(sys.argv[1]), 'unet', threads=1); "
        f"print(*{set(BINDINGS)} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tiny_bundle.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{fast}\n"
    assert len(list(cache.iterdir())) == 1


def test_a_remembered_backend_that_is_gone(
    tiny_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch, "onnxruntime")
    assert backend_of(tiny_bundle) == "openvino"
    (file,) = cache.iterdir()
    # The same file as before the package went: what a package that fails to import looks like.
    monkeypatch.setattr(choice, "_memory_path", lambda *_: file)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert backend_of(tiny_bundle) == "onnxruntime"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert backend_of(tiny_bundle) is None


def test_speed_never_costs_digits(
    tiny_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch, "openvino")
    coarse = portable(tiny_bundle, "onnxruntime", "fp16")
    exact = portable(tiny_bundle, "openvino", "fp32")
    assert fastest_engine(with_engines(tiny_bundle, coarse, exact), "unet") == exact
    assert not cache.exists(), "one candidate is not measured"
    rival = portable(tiny_bundle, "onnxruntime", "fp32")
    assert fastest_engine(with_engines(tiny_bundle, coarse, exact, rival), "unet") == rival


def test_int8_is_taken_by_whom_asks_for_it_or_has_nothing_else(
    tiny_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch, "onnxruntime")
    exact = portable(tiny_bundle, "onnxruntime", "fp32")
    int8 = int8_engine("unet")
    both = with_engines(tiny_bundle, int8, exact)
    assert fastest_engine(both, "unet") == exact
    assert listed_engines(both, "unet") == [exact]
    assert fastest_engine(both, "unet", precision="int8") == int8
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # no reason to give away digits either
    with pytest.raises(BackendError, match="onnxruntime"):
        open_engine(both, "unet")
    assert fastest_engine(with_engines(tiny_bundle, int8), "unet") == int8
    assert listed_engines(both, "unet", backend="openvino") == [int8]
    assert not cache.exists()


def test_of_one_backend_the_gpu_comes_first(tiny_bundle: Bundle) -> None:
    on_cpu = portable(tiny_bundle, "onnxruntime", "fp32")
    on_gpu = replace(on_cpu, target="cuda")
    rival = portable(tiny_bundle, "openvino", "fp32")
    found = listed_engines(with_engines(tiny_bundle, on_cpu, rival, on_gpu), "unet")
    assert found == [rival, on_gpu, on_cpu]


def test_engines_of_one_backend_are_measured_apart(
    tiny_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def noted(*arguments: Any, **options: Any) -> Any:
        engine = open_engine(*arguments, **options)
        opened.append(engine.entry)
        return engine

    monkeypatch.setattr(choice, "open_engine", noted)
    plain = portable(tiny_bundle, "onnxruntime", "fp32")
    lean = replace(plain, flags=LEAN, key="1" * 64)
    assert fastest_engine(with_engines(tiny_bundle, plain, lean), "unet") in (plain, lean)
    assert opened == [plain, lean]
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["paces"].keys() == {plain.key, lean.key}


def test_what_opens_in_place_of_another_is_not_its_measure(
    tiny_bundle: Bundle,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A GPU whose provider is there and does not start, beside the processor."""
    caplog.set_level(logging.INFO, logger="sd_engines.choice")
    on_cpu = portable(tiny_bundle, "onnxruntime", "fp32")
    on_gpu = portable(tiny_bundle, "onnxruntime", "fp32", target="cuda")

    def without_gpu(target: str) -> Any:
        if target == "cuda":
            raise BackendError("no GPU", "Take one.")
        return onnxruntime_package.package(target)

    monkeypatch.setattr("sd_engines.backends.onnxruntime.package", without_gpu)
    monkeypatch.setattr(choice, "check_engine", lambda *_: None)
    assert fastest_engine(with_engines(tiny_bundle, on_cpu, on_gpu), "unet") == on_cpu
    assert "unet: onnxruntime was not measured: onnxruntime does not start on cuda" in caplog.text
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["paces"].keys() == {on_cpu.key}


def test_a_single_engine_is_not_measured(tiny_bundle: Bundle, cache: Path) -> None:
    single = with_engines(tiny_bundle, portable(tiny_bundle, "onnxruntime", "fp32"))
    assert backend_of(single) == "onnxruntime"
    assert backend_of(with_engines(tiny_bundle)) is None
    assert not cache.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"paces": 7, "warnings": []}',
        b'{"paces": {}, "warnings": []}',
        b'{"paces": {"another": {"open_ms": 1, "run_ms": 1}}, "warnings": []}',
        b"[" * 100_000,
    ],
)
def test_a_corrupt_memory_is_replaced(
    tiny_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    slow_down(monkeypatch, "openvino")
    assert backend_of(tiny_bundle) == "onnxruntime"
    (file,) = cache.iterdir()
    good = json.loads(file.read_text())
    file.write_bytes(content)
    assert backend_of(tiny_bundle) == "onnxruntime"
    assert json.loads(file.read_text())["paces"].keys() == good["paces"].keys()
    assert list(cache.iterdir()) == [file], "no staging file stays"


def test_no_place_to_remember(
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("choice", "cache"):
        caplog.set_level(logging.INFO, logger=f"sd_engines.{name}")
    slow_down(monkeypatch, "openvino")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert backend_of(tiny_bundle) == "onnxruntime"
    assert caplog.text.count("Measuring once") == 2
    assert caplog.text.count("is not kept") == 2
    assert caplog.text.count("The next start measures again") == 2


def test_where_it_is_remembered(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """$XDG_CACHE_HOME where it is absolute, else ~/.cache; apart by threads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    for threads in (1, 2):
        backend_of(tiny_bundle, threads=threads)
    assert len(list((tmp_path / ".cache" / "sd-toolkit").glob("auto-*.json"))) == 2
    assert not (tmp_path / "relative").exists()


def test_the_other_components_follow(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any component goes to the backend of the engine that is preferred, while it opens."""
    unet = tiny_bundle.manifest.components["unet"]
    engines = tuple(
        portable_entry(name, unet, PROFILE, backend, version="1", target="cpu", precision="fp32")
        for name in ("unet", "other")
        for backend in BINDINGS
    )
    components = {"unet": unet, "other": unet}
    manifest = replace(tiny_bundle.manifest, components=components, engines=engines)
    bundle = Bundle(tiny_bundle.path, manifest)
    for engine in engines[:2]:
        with open_engine(bundle, "other", prefer=engine) as opened:
            assert opened.entry.backend == engine.backend
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with open_engine(bundle, "other", prefer=engines[0]) as opened:
        assert opened.entry.backend == "openvino"


def test_what_is_wrong_is_not_passed_over(tiny_bundle: Bundle, cache: Path) -> None:
    with pytest.raises(ConfigError, match="threads is 0"):
        fastest_engine(tiny_bundle, "unet", threads=0)
    with (tiny_bundle.path / "unet" / "model.onnx_data").open("r+b") as file:
        file.write(b"\x01\x02\x03")
    with pytest.raises(BundleError, match="altered"):
        fastest_engine(tiny_bundle, "unet")
    assert not cache.exists()


def test_a_stale_plan_is_named_every_time(
    tiny_bundle: Bundle, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="sd_engines.choice")
    needs("tensorrt_rtx")
    stale = stale_plan("fp16")
    bundle = with_engines(tiny_bundle, *tiny_bundle.manifest.engines, stale)
    for count in (1, 2, 3):
        assert backend_of(bundle) in BINDINGS
        assert caplog.text.count("built by tensorrt-rtx 1.0.0") == count
    assert len(list(cache.iterdir())) == 1
