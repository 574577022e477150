"""Builds ``libsd_runtime.so``: C that starts Python, and the glue that cffi writes for it.

The library belongs to the environment that built it: it is linked with its libpython and starts
with its ``python`` as the program's name, from which Python finds the environment's packages.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from sd_engines.border import check_package
from sd_engines.errors import ConfigError

LIBRARY = "libsd_runtime.so"
NATIVE_MODULE = "_sd_runtime_door"
_HERE = Path(__file__).parent
INCLUDE = _HERE / "include"
SOURCE = _HERE / "source"
HEADER = INCLUDE / "sd_runtime.h"
SYMBOLS = INCLUDE / "symbols.txt"
_CFLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-fPIC", "-pthread")


def build_library(folder: Path) -> Path:
    """Build the library into ``folder``, beside its headers and its CMake package; its path.

    Raises `ConfigError` where the compiler or a shared libpython is missing, or where the compiler
    fails, and `BackendError` where cffi is missing; what was in ``folder`` before is still there
    then.
    """
    libpython = _libpython()
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise ConfigError(
            f"there is no C compiler {' '.join(compiler)!r}", "Install one, or name one: CC=gcc."
        )
    check_package("cffi", extra="embed")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging_folder = tempfile.TemporaryDirectory(dir=folder, prefix=".build-")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror}", "Choose another folder."
        ) from error
    with staging_folder as name:
        staging = Path(name)
        _write_glue(staging / "glue.c")
        (staging / "symbols.map").write_text(_version_script())
        _compile(compiler, staging, libpython)
        (staging / LIBRARY).replace(folder / LIBRARY)
        for file in INCLUDE.iterdir():
            shutil.copyfile(file, folder / file.name)
    return folder / LIBRARY


def symbols() -> list[str]:
    """The names that the library exports, and nothing else."""
    return SYMBOLS.read_text().split()


def _libpython() -> Path:
    name = str(sysconfig.get_config_var("LDLIBRARY"))
    path = Path(str(sysconfig.get_config_var("LIBDIR")), name)
    if not sysconfig.get_config_var("Py_ENABLE_SHARED") or not path.exists():
        raise ConfigError(
            f"this Python has no shared library ({path})",
            "Use one that has: a distribution's with its -dev package, conda's, or one built "
            "with ./configure --enable-shared.",
        )
    return path


def _declarations(header: Path, begin: str, end: str) -> str:
    """What stands between two lines of ``header``: cffi reads no preprocessor's."""
    return header.read_text().partition(begin)[2].partition(end)[0]


def _write_glue(path: Path) -> None:
    from cffi import FFI

    ffi = FFI()
    ffi.cdef(_declarations(HEADER, 'extern "C" {\n#endif\n', "#ifdef __cplusplus\n}"))
    text = _declarations(
        SOURCE / "door.h", "/* Begin of what cffi reads. */", "/* End of what cffi reads. */"
    )
    ffi.cdef(text.replace("sd_status *door_", 'extern "Python+C" sd_status *door_'))
    ffi.set_source(NATIVE_MODULE, '#include "door.h"')
    with contextlib.redirect_stdout(io.StringIO()):  # it says what it writes
        ffi.emit_c_code(str(path))


def _version_script() -> str:
    names = "; ".join(symbols())
    return f"SD_RUNTIME_1 {{ global: {names}; local: *; }};\n"


def _compile(compiler: list[str], staging: Path, libpython: Path) -> None:
    command = [
        *compiler,
        *_CFLAGS,
        *shlex.split(os.environ.get("CFLAGS", "")),
        f"-I{INCLUDE}",
        f"-I{SOURCE}",
        f"-I{sysconfig.get_path('include')}",
        f'-DSD_PYTHON="{_escaped(sys.executable)}"',
        "-shared",
        f"-Wl,-soname,{LIBRARY}",
        f"-Wl,--version-script={staging / 'symbols.map'}",
        f"-Wl,-rpath,{libpython.parent}",
        *sorted(map(str, SOURCE.glob("*.c"))),
        str(staging / "glue.c"),
        str(libpython),
        "-ldl",
        *shlex.split(os.environ.get("LDFLAGS", "")),
        "-o",
        str(staging / LIBRARY),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode != 0:
        raise ConfigError(
            f"the compiler failed:\n{result.stderr.strip()}",
            "Mend what it names; Python's headers are in the distribution's -dev package.",
        )


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
