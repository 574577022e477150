"""What a latency depends on beside the program: the machine, its system, and the packages.

A fingerprint is flat text by name. Names in `INFORMATIVE` may differ between two measurements
that are compared: this program itself, which is what a comparison judges, and what a machine does
at the moment. A difference in any other makes the two foreign to each other.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sd_engines.cores import usable_cores
from sd_engines.kernel_file import kernel_text

if TYPE_CHECKING:
    from collections.abc import Mapping

INFORMATIVE: Final = frozenset(
    {"sd-toolkit", "commit", "cpu_mhz", "load_average", "gpu_clocks", "gpu_temperature"}
)
ABSENT: Final = "absent"
"""What `difference` says for a name that one of the two does not have."""

PACKAGES: Final = (
    *("sd-toolkit", "numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("tensorrt", "tensorrt-rtx", "cupy-cuda13x"),
)
_CPU_FLAGS: Final = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "sve", "sve2", "bf16", "i8mm"),
)
_THREAD_PREFIXES: Final = (
    *("OMP_", "KMP_", "GOMP_", "OPENBLAS_", "MKL_", "TBB_", "BLIS_", "ORT_", "OV_", "OPENVINO_"),
    *("ONEDNN_", "DNNL_", "CUDA_", "NVIDIA_TF32_", "MALLOC_"),
)
_UNRELATED: Final = frozenset({"ORT_DISABLE_TELEMETRY", "CUDA_HOME", "CUDA_PATH"})
_THREAD_VARIABLES: Final = frozenset({"LD_PRELOAD", "GLIBC_TUNABLES"})
_CPU0: Final = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_GPU_QUERY: Final = {
    "gpu": "name",
    "gpu_driver": "driver_version",
    "gpu_memory": "memory.total",
    "gpu_power_limit": "power.limit",
    "gpu_max_clocks": "clocks.max.sm",
    "gpu_clocks": "clocks.sm",
    "gpu_temperature": "temperature.gpu",
}


def environment() -> dict[str, str]:
    """The fingerprint of this process. What cannot be read is left out."""
    found = {
        **_processor(),
        "cores": str(usable_cores()),
        "affinity": _ranges(sorted(os.sched_getaffinity(0))),
        "memory": _memory(),
        "huge_pages": _chosen(kernel_text(_HUGE_PAGES)),
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: found for name in PACKAGES if (found := _package_version(name))},
        **_thread_variables(),
        **_gpu(),
        "commit": _commit(),
        "load_average": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    return {name: value for name, value in found.items() if value}


def difference(base: Mapping[str, str], new: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What makes ``new`` foreign to ``base``: name → both values; empty where they compare."""
    names = [name for name in {**base, **new} if name not in INFORMATIVE]
    pairs = {name: (base.get(name, ABSENT), new.get(name, ABSENT)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _processor() -> dict[str, str]:
    """Model, flags that change what kernels run, governor and current clock, as Linux says."""
    info: dict[str, str] = {}
    for line in kernel_text("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        info.setdefault(name.strip(), value.strip())
    flags = set((info.get("flags") or info.get("Features") or "").split())
    names = ("vendor_id", "model name", "cpu family", "model", "stepping")
    model = [
        info[name] if name in names[:2] else f"{name} {info[name]}"
        for name in names
        if name in info
    ]
    return {
        "cpu": ", ".join(model) or platform.processor(),
        "cpu_flags": " ".join(flag for flag in _CPU_FLAGS if flag in flags),
        "cpu_cache": info.get("cache size", ""),
        "cpu_governor": kernel_text(_CPU0 / "scaling_governor").strip(),
        "cpu_max_khz": kernel_text(_CPU0 / "scaling_max_freq").strip(),
        "cpu_mhz": info.get("cpu MHz", ""),
    }


def _memory() -> str:
    """Total, in whole GiB: what a kernel keeps for itself moves the last digits."""
    return f"{round(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30)} GiB"


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.system()


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _thread_variables() -> dict[str, str]:
    return {
        f"env:{name}": value
        for name, value in sorted(os.environ.items())
        if name in _THREAD_VARIABLES
        or (name.startswith(_THREAD_PREFIXES) and name not in _UNRELATED)
    }


def _gpu() -> dict[str, str]:
    """The GPUs as nvidia-smi reports them, one after the other; nothing where there is none."""
    query = ",".join(_GPU_QUERY.values())
    lines = nvidia_smi(f"--query-gpu={query}", "--format=csv,noheader").splitlines()
    columns = zip(*(line.split(", ") for line in lines), strict=False)
    return {name: "; ".join(column) for name, column in zip(_GPU_QUERY, columns, strict=False)}


def nvidia_smi(*options: str) -> str:
    """What it says; nothing where it is not here or fails."""
    program = shutil.which("nvidia-smi")
    return "" if program is None else _output(program, *options)


def _commit() -> str:
    """The checkout's commit, with "+" where tracked files differ; empty where there is none."""
    git = shutil.which("git")
    folder = Path(__file__).parents[2]
    if git is None or not (folder / ".git").exists():
        return ""
    commit = _output(git, "-C", str(folder), "rev-parse", "HEAD")
    changed = _output(git, "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return commit + "+" * bool(commit and changed)


def _output(*command: str) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603 - both programs are found by name
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip() if ended.returncode == 0 else ""


def _chosen(text: str) -> str:
    """What stands in brackets, as the kernel marks one choice of several."""
    return text.partition("[")[2].partition("]")[0]


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
