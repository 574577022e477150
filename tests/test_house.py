"""The house of CONTRIBUTING.md: imports run one way, and heavy ones run late."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SDIST = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]
SOURCES = {  # in the one order in which imports may run: each may import those before it
    "sd_engines": ROOT / "engines/sd_engines",
    "sd_runtime": ROOT / "runtime/sd_runtime",
    "sd_export": ROOT / "export/sd_export",
    "sd_bench": ROOT / "benchmarks/sd_bench",
}
ORDER = list(SOURCES)
IMPORT_NAMES = {
    "fastapi": ["fastapi", "pydantic"],
    "pillow": ["PIL"],
    "huggingface-hub": ["huggingface_hub"],
    "onnxruntime-gpu": ["onnxruntime"],
    "cupy-cuda13x": ["cupy"],
    "tensorrt-cu13-bindings": ["tensorrt_bindings"],
    "tensorrt-rtx": ["tensorrt_rtx"],
    "onnxscript": ["onnxscript", "onnx_ir"],
}
BACKEND_EXTRAS = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")
MOST_LINES = 300
MODEL_LIBRARIES = {"diffusers", "transformers"}
HEAVY = {
    *("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors"),
    *("huggingface_hub", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cupy"),
    *("nncf", "polygraphy", "sympy", "scipy", "matplotlib", "ray"),
}


def _declared(*extras: str) -> set[str]:
    """Import names of the distribution's dependencies and those of ``extras``."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][e] for e in extras)]
    names = {re.split(r"[^A-Za-z0-9._-]", text)[0].lower() for part in lists for text in part}
    return {name for n in names for name in IMPORT_NAMES.get(n, [n.replace("-", "_")])}


MAY_IMPORT = {
    "sd_engines": {"numpy"} | _declared(*BACKEND_EXTRAS) - _declared(),
    # and the next test
    "sd_runtime": _declared("embed", "serve", "ray") | {"cupy", "triton_python_backend_utils"},
    "sd_export": _declared("export", "int8") - {"openvino"},
    "sd_bench": _declared(*PROJECT["optional-dependencies"]),
}


def _modules(package: str) -> list[Path]:
    return sorted(SOURCES[package].rglob("*.py"))


@pytest.mark.parametrize("package", ORDER)
def test_files_stay_short(package: str) -> None:
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in _modules(package)}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def _imported(path: Path) -> set[str]:
    """Everything that ``path`` imports, late, for types only, or by name included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            found.add(node.module)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            target = node.args[0]
            if name in ("import_module", "import_package", "__import__") and isinstance(
                target, ast.Constant
            ):
                found.add(str(target.value))
    return found


def _imports(path: Path) -> set[str]:
    """The first names of it."""
    return {name.partition(".")[0] for name in _imported(path)}


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package: str) -> None:
    known = set(sys.stdlib_module_names) | set(ORDER[: ORDER.index(package) + 1])
    modules = _modules(package)
    assert modules
    for path in modules:
        strangers = _imports(path) - known - MAY_IMPORT[package]
        assert not strangers, f"{path.relative_to(ROOT)} imports {sorted(strangers)}"


def test_only_sd_serve_needs_its_extra() -> None:
    extra = _declared("serve") - _declared()
    serve = SOURCES["sd_runtime"] / "serve"
    for path in _modules("sd_runtime"):
        outside = not path.is_relative_to(serve)
        of_serve = {name for name in _imported(path) if name.startswith("sd_runtime.serve")}
        assert not outside or not of_serve, path
        free = outside or path.stem in ("__init__", "cli")
        assert not free or not _imports(path) & extra, path
    loaded = _loaded_by("import sd_runtime.cli, sd_runtime.job, sd_runtime.serve.cli")
    assert not loaded & extra


def test_only_two_modules_know_the_model_classes() -> None:
    knowing = {
        path.relative_to(ROOT).as_posix()
        for package in ORDER[:3]
        for path in _modules(package)
        if _imports(path) & MODEL_LIBRARIES
    }
    assert knowing <= {"export/sd_export/load.py", "export/sd_export/oracle.py"}


def test_no_drawers_for_everything() -> None:
    names = [path for package in ORDER for path in _modules(package)]
    assert not [p for p in names if re.match(r"utils?|common|helpers?|misc|base_", p.stem)]


def _loaded_by(code: str) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in result.stdout.split()}


def _dotted(package: str, path: Path) -> str:
    parts = path.relative_to(SOURCES[package].parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


@pytest.mark.parametrize("package", ["sd_engines", "sd_runtime"])
def test_no_module_imports_heavy_packages(package: str) -> None:
    names = [_dotted(package, path) for path in _modules(package) if path.stem != "__main__"]
    loaded = _loaded_by("import " + ", ".join(names))
    assert not loaded & HEAVY
    assert package == "sd_runtime" or not loaded & {"click", "PIL", "tokenizers"}


@pytest.mark.parametrize("package", ORDER)
def test_package_and_command_import_nothing_heavy(package: str) -> None:
    cli = SOURCES[package] / "cli.py"
    loaded = _loaded_by(f"import {package}" + (f", {package}.cli" if cli.exists() else ""))
    assert not loaded & HEAVY
    assert package != "sd_engines" or "numpy" not in loaded


def test_every_licence_that_is_shipped_is_declared() -> None:
    shipped = [p for package in ORDER for p in SOURCES[package].rglob("*LICENSE*")]
    assert shipped, "CLIP's, beside its vocabulary"
    names = {path.relative_to(ROOT).as_posix() for path in shipped}
    assert names <= set(PROJECT["license-files"])
    for path in shipped:
        assert path.read_text("utf-8").split()[0] in PROJECT["license"].split(" AND ")


def test_type_checkers_know_the_names_that_are_loaded_late(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "from sd_engines import Bundle, open_bundel\n"
        "from sd_runtime import Pipeline, Pipline\n"
        "reveal_type(Pipeline.load)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir=/dev/null", "program.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": ":".join(str(path.parent) for path in SOURCES.values())},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert [line.partition(" has ")[2] for line in lines if " error: " in line] == [
        'no attribute "open_bundel"; maybe "open_bundle"?  [attr-defined]',
        'no attribute "Pipline"; maybe "Pipeline"?  [attr-defined]',
    ]
    assert "sd_runtime.pipeline.Pipeline" in done.stdout


@pytest.mark.skipif(not ((ROOT / ".git").exists() and shutil.which("git")), reason="no clone")
def test_a_source_distribution_is_what_a_clone_is() -> None:
    """And holds no bundle that somebody made beside the README."""
    always = {".gitignore", "LICENSE", "README.md", "pyproject.toml"}
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", ROOT, "ls-files"]
    tracked = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {path.partition("/")[0] for path in filter(None, tracked)}
    assert {*SDIST["only-include"], *always} == names


@pytest.mark.parametrize("command", ["sd-export", "sd-run", "sd-serve", "sd-bench"])
def test_every_command_says_its_version(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = entry_points(group="console_scripts", name=command)
    assert entry.load()(["--version"]) == 0
    assert capsys.readouterr().out == f"{version('sd-toolkit')}\n"
