"""Files that appear whole or not at all, and what they are called."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from sd_engines.errors import ConfigError, SdError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_STAGING = re.compile(r"\..+\.[0-9a-f]{8}\.tmp", re.DOTALL)
"""How `write_files` calls a file until it is whole."""
_PLACEHOLDER = re.compile(r"\{(index|seed)(:0?\d{0,2}d?)?\}|\{\{|\}\}")
"""What `output_paths` fills in, and braces that stand for themselves."""


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write all files, then rename all into place: each is whole or what it was before.

    Nothing is renamed before all are written. Raises `SdError` that names the file where the disk
    is full or refuses.
    """
    staged: dict[Path, Path] = {}
    target = Path()
    try:
        for target, data in contents.items():
            staging = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")
            staged[target] = staging
            with staging.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for target, staging in staged.items():
            staging.replace(target)
    except OSError as error:
        raise SdError(
            f"cannot write {target}: {error.strerror}",
            "Free some space or choose another place; every file is whole or what it was before.",
        ) from error
    finally:
        for staging in staged.values():
            with contextlib.suppress(OSError):
                staging.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """Make ``folder``, keep others out of it, and sweep away what a killed process half-wrote.

    Others are those who claim it too and write by `write_files`. A folder that stays empty is not
    left behind. Raises `ConfigError` where another process has it or it cannot be written to.
    """
    was_there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder / "picture.png")
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder}: {error.strerror}", "Choose another --output."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process writes into {folder}", "Wait for it, or choose another --output."
            ) from error
        _sweep(folder)
        yield
        _sweep(folder)
    finally:
        os.close(descriptor)
        if not was_there:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _sweep(folder: Path) -> None:
    for path in folder.iterdir():
        if _STAGING.fullmatch(path.name):
            path.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise `ConfigError` now where ``path`` could not be written later."""
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder}", f"Make it: mkdir -p {quote(str(folder))}."
        )
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", f"Name a file in it: {path / 'picture.png'}.")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no regular file", "Name one that is, or that is not there.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder} may not be written to", "Choose another folder.")


def numbered_paths(path: Path, count: int) -> list[Path]:
    """``path`` itself for one picture; else ``path`` with -0, -1, … (of one length) in the name."""
    if count == 1:
        return [path]
    width = len(str(count - 1))
    return [path.with_name(f"{path.stem}-{index:0{width}}{path.suffix}") for index in range(count)]


def depth_path(path: Path) -> Path:
    """Where the depth map of the picture ``path`` lies: circle.png has circle.depth.png."""
    return path.with_suffix(".depth.png")


def output_paths(template: str, seeds: Sequence[int]) -> list[Path]:
    """One path per picture: ``{index}`` and ``{seed}`` filled in, or numbered without them.

    Raises `ConfigError` for another placeholder, or where two pictures would share a name.
    """
    if "{" not in template:
        return numbered_paths(Path(template), len(seeds))
    hint = "Use {index} and {seed}, such as picture-{index:03}.png."
    if re.search(r"[{}]", _PLACEHOLDER.sub("", template)):
        raise ConfigError(f"--output {template!r} cannot be filled in", hint)
    paths = [Path(template.format(index=i, seed=seed)) for i, seed in enumerate(seeds)]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"--output {template!r} names two pictures alike", hint)
    return paths
