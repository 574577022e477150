"""The README is true: its Python runs, its commands exist, its files are there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("benchmarks/shapes/*/README.md"),
    ]
)
README = (ROOT / "README.md").read_text("utf-8")
USE = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]

OF_OTHERS = {
    *("--constraint", "--index-url", "--no-deps"),  # pip's
    *("--enable-shared", "--entrypoint", "--model-repository", "--rawfile"),  # Python's, docker's …
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", document.read_text("utf-8"))
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("document", USE, ids=lambda path: path.name)
def test_options_that_are_named_exist(document: Path) -> None:
    from sd_bench.cli import cli
    from sd_export.cli import export_command
    from sd_runtime.cli import run
    from sd_runtime.serve.cli import serve_command

    context = click.Context(cli)
    instruments = [cli.get_command(context, name) for name in cli.list_commands(context)]
    commands = [run, serve_command, export_command, *export_command.commands.values(), *instruments]
    known = {name for c in commands for p in c.params for name in p.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", document.read_text("utf-8")))
    assert named - OF_OTHERS <= known


def test_make_targets_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b", README)) <= targets


def test_make_leaves_no_environment_of_a_python_that_is_too_old(tmp_path: Path) -> None:
    """Which the next `make`, with a newer one, would go on with."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old, python = tmp_path / "old", shlex.quote(sys.executable)
    old.write_text(
        f"""#!/bin/sh
if [ "$1" = -c ]; then exec {python} -c "import sys; sys.version_info = (3, 10, 12); $2"; fi
exec {python} "$@"
"""
    )
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "demo", f"PYTHON={old}"],
        cwd=tmp_path,
        env=os.environ | {"MAKEFLAGS": ""},  # not those of the make that runs the tests
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "older than Python 3.11" in done.stderr
    assert "make demo PYTHON=python3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_python_of_the_readme_runs(
    shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "shapes.bundle").symlink_to(shapes_bundle)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})  # noqa: S102 - it is our own README
    assert (tmp_path / "circle.png").stat().st_size > 500
