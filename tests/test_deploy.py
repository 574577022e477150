"""docs/deploy: files for other machines, checked by their linters and by our own parser."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from sd_runtime.serve.cli import serve_command
from sd_runtime.serve.operations import OPEN_PATHS

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))


def parsed(arguments: list[str]) -> dict[str, Any]:
    """``arguments`` as sd-serve reads them; `click.UsageError` where it would refuse them."""
    with serve_command.make_context("sd-serve", list(arguments)) as context:
        return context.params


def manifests() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


def entrypoint(dockerfile: Path) -> list[str]:
    (line,) = re.findall(r"^ENTRYPOINT (.+)$", dockerfile.read_text(), re.MULTILINE)
    return list(json.loads(line))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_the_image(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, dockerfile], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    text = dockerfile.read_text()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    assert not re.search(r"\[[^]]*(export|dev|bench)", text), "no torch inside"
    name, *arguments = entrypoint(dockerfile)
    assert name == "sd-serve"
    assert parsed(arguments)["host"] == "0.0.0.0"  # noqa: S104 - inside a container
    (probe,) = re.findall(r"urlopen\('http://127\.0\.0\.1:8000(\S+)'", text)
    assert probe in OPEN_PATHS
    assert re.search(r"^USER 10001", text, re.MULTILINE)


def test_the_manifest() -> None:
    for manifest in manifests().values():
        kubernetes_validate.validate(manifest, "1.30", strict=True)
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    _, *arguments = entrypoint(DEPLOY / "cpu.Dockerfile")
    options = parsed([*arguments, *container["args"]])
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    assert options["bundles"] == (mounts["bundles"],)
    assert options["api_key_file"].parent == mounts["key"]
    assert options["port"] == container["ports"][0]["containerPort"]
    assert str(options["threads"]) == container["resources"]["limits"]["cpu"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in OPEN_PATHS
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}


def test_the_unit() -> None:
    unit = RawConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "sd-serve.service")
    command, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert Path(command).name == "sd-serve"
    options = parsed(arguments)
    assert str(options["api_key_file"]) == "${CREDENTIALS_DIRECTORY}/key"
    assert unit["Service"]["LoadCredential"].startswith("key:")


def test_the_parser_would_notice() -> None:
    with pytest.raises(click.UsageError):
        parsed(["/bundle", "--no-such-option"])
