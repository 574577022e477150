"""The peers, as data, and the Python environments that they live in."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from sd_engines.cache import cached_file
from sd_engines.errors import ConfigError, SdError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable

WORKERS: Final = Path(__file__).parents[2] / "peers"
"""The worker scripts and requirement files; a part of the repository, not of the wheel."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to draw. ``environment`` None: the Python that runs `sd-bench`."""

    name: str
    worker: Path
    """The script, and in ``arguments`` what it is called with."""
    arguments: tuple[str, ...] = ()
    precision: str = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    environment: str | None = None
    modules: tuple[str, ...] = ()
    """What must be importable for the peer to count as installed."""
    prepared: str
    """Peers of one name here share what is converted once."""
    prepared_by_size: bool = False
    """Whether that is of use for one picture size only."""


OURS: Final = Peer(
    name="sd-toolkit", worker=WORKERS / "sd_toolkit.py", prepared="sd-toolkit", precision="bundle's"
)
REFERENCE: Final = "diffusers-fp32"
REFERENCE_CUDA: Final = "diffusers-cuda-fp32"
"""Whose picture is the right one, where no GPU takes part and where one does."""


def _diffusers(
    name: str, precision: str, *arguments: str, device: Literal["cpu", "cuda"] = "cpu"
) -> Peer:
    arguments = (*arguments, "--cuda") if device == "cuda" else arguments
    return Peer(
        name=name,
        worker=WORKERS / "diffusers_pipeline.py",
        arguments=arguments,
        precision=precision,
        device=device,
        environment="diffusers",
        modules=("diffusers", "transformers", "accelerate"),
        prepared=name,
        prepared_by_size="--compile" in arguments,
    )


def _genai(precision: str) -> Peer:
    return Peer(
        name=f"openvino-genai-{precision}",
        worker=WORKERS / "openvino_genai_pipeline.py",
        precision=precision,
        environment="openvino-genai",
        modules=("openvino_genai", "optimum.intel"),
        prepared="openvino-genai",
    )


PEERS: Final = (
    _diffusers(REFERENCE, "fp32"),
    _diffusers("diffusers-bf16", "bf16"),
    _diffusers("diffusers-compile-fp32", "fp32", "--compile"),
    _diffusers("diffusers-compile-bf16", "bf16", "--compile"),
    Peer(
        name="optimum-onnxruntime",
        worker=WORKERS / "optimum_onnxruntime.py",
        environment="optimum",
        modules=("optimum.onnxruntime",),
        prepared="optimum",
    ),
    _genai("fp32"),
    _genai("bf16"),
    Peer(
        name="stable-diffusion-cpp",
        worker=WORKERS / "stable_diffusion_cpp_binding.py",
        precision="f16",
        environment="stable-diffusion-cpp",
        modules=("stable_diffusion_cpp",),
        prepared="stable-diffusion-cpp",
    ),
    _diffusers(REFERENCE_CUDA, "fp32", device="cuda"),
    _diffusers("diffusers-cuda-fp16", "fp16", device="cuda"),
    _diffusers("diffusers-compile-cuda-fp16", "fp16", "--compile", device="cuda"),
    Peer(
        name="optimum-onnxruntime-cuda-fp16",
        worker=WORKERS / "optimum_onnxruntime.py",
        arguments=("--cuda",),
        precision="fp16",
        device="cuda",
        environment="optimum-cuda",
        modules=("optimum.onnxruntime",),
        prepared="optimum-cuda-fp16",
    ),
)
"""Every peer that can be measured, in the order of the table."""
ENVIRONMENTS: Final = tuple(dict.fromkeys(p.environment for p in PEERS if p.environment))


def default_cache() -> Path:
    """Where environments and conversions are kept; `ConfigError` where the user has no home."""
    folder = cached_file("peers")
    if folder is None:
        raise ConfigError("there is no home to keep environments in", "Name one: --cache FOLDER.")
    return folder


def find_peers(names: Iterable[str], *, gpu: bool = False) -> list[Peer]:
    """The peers of these names; `ConfigError` for an unknown one.

    Where none is named, all that draw on the ``gpu``, or on the CPU.
    """
    known = {peer.name: peer for peer in PEERS}
    device = "cuda" if gpu else "cpu"
    wanted = list(dict.fromkeys(names)) or [p.name for p in PEERS if p.device == device]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"unknown peer {name!r}", nearest(name, known))
    return [known[name] for name in wanted]


def interpreter(peer: Peer, cache: Path) -> Path:
    """The Python that runs ``peer``, there or not."""
    if peer.environment is None:
        return Path(sys.executable)
    return cache / "environments" / peer.environment / "bin" / "python"


def missing(peer: Peer, cache: Path) -> str | None:
    """What ``peer`` lacks to run here; None where it is installed."""
    python = interpreter(peer, cache)
    if not python.exists():
        return f"no environment at {python.parents[1]}"
    if not peer.modules:
        return None
    # Importing takes seconds; finding does not, and only a package's parents are imported by it.
    code = (
        "import sys\nfrom importlib.util import find_spec\n"
        "print(*(m for m in sys.argv[1:] if not find_spec(m.split('.')[0]) or not find_spec(m)))"
    )
    found = subprocess.run(  # noqa: S603 - our own code, in an interpreter that the user set up
        [python, "-c", code, *peer.modules], capture_output=True, text=True, check=False
    )
    if found.returncode:
        return f"{python} does not run: {found.stderr.strip().splitlines()[-1:]}"
    return f"no module {found.stdout.strip()}" if found.stdout.strip() else None


def how_to_install(peer: Peer) -> str:
    """The command that installs ``peer``."""
    if peer.environment is None:
        return "Run it from a checkout of the repository: pip install --editable ."
    return f"sd-bench peers --setup {peer.environment}"


def set_up(environment: str, cache: Path) -> Path:
    """Make the environment of this name below ``cache`` with pip; where it is.

    Made anew where it is there already. `ConfigError` for an unknown name, `SdError` where pip or
    a compiler fails; what they print goes to standard error.
    """
    if environment not in ENVIRONMENTS:
        raise ConfigError(
            f"unknown environment {environment!r}", nearest(environment, ENVIRONMENTS)
        )
    folder = cache / "environments" / environment
    requirements = WORKERS / f"{environment}.txt"
    install = ("-m", "pip", "install", "--requirement")
    commands: tuple[tuple[str | Path, ...], ...] = (
        (sys.executable, "-m", "venv", "--clear", folder),
        (folder / "bin" / "python", *install, requirements),
    )
    for command in commands:
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:  # noqa: S603
            raise SdError(
                f"the environment {environment} could not be made",
                f"See what is printed above, correct {requirements}, and run this command again.",
            )
    return folder
