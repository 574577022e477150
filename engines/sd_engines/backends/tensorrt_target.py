"""Which GPUs a plan is for, by the word that is its target.

TensorRT's are for the model of GPU that they are built on (``sm90-nvidia-h200``), unless they are
asked for all of its compute capability (``sm90``) or for all from Ampere on (``sm80+``), which
keeps some kernels from them. TensorRT-RTX's are for ``any``, or for the capabilities that are named
(``sm86+sm120``).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from sd_engines.backends.cuda import this_gpu
from sd_engines.errors import ConfigError

if TYPE_CHECKING:
    from sd_engines.backends.cuda import Gpu

ANY_TARGET: Final = "any"
"""Every GPU that the version of TensorRT-RTX supports, but Turing (sm75)."""
AMPERE_AND_LATER: Final = "sm80+"


def default_target(backend: str) -> str:
    """What a plan is for where nobody says: TensorRT's for this GPU, or `BackendError`."""
    return ANY_TARGET if backend == "tensorrt-rtx" else target_of(this_gpu())


def target_of(gpu: Gpu) -> str:
    """The target of plans for GPUs like this one alone."""
    return f"sm{gpu.capability}-{re.sub('[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}"


def is_for(target: str, gpu: Gpu) -> bool:
    """Whether a plan of this ``target`` runs on ``gpu``."""
    if target == AMPERE_AND_LATER:
        return gpu.capability >= 80
    return target in (ANY_TARGET, target_of(gpu)) or f"sm{gpu.capability}" in target.split("+")


def aim(module: Any, config: Any, backend: str, target: str) -> None:
    """Let ``config``, a builder's, build for ``target``.

    `ConfigError` for one that the package does not know or, of TensorRT, this GPU is not among.
    """
    if backend == "tensorrt":
        config.hardware_compatibility_level = _level(module, target)
    elif target != ANY_TARGET:
        _set_compute_capabilities(module, config, target)


def _level(module: Any, target: str) -> Any:
    gpu, level = this_gpu(), module.HardwareCompatibilityLevel
    levels = {
        target_of(gpu): level.NONE,
        f"sm{gpu.capability}": level.SAME_COMPUTE_CAPABILITY,
        **({AMPERE_AND_LATER: level.AMPERE_PLUS} if is_for(AMPERE_AND_LATER, gpu) else {}),
    }
    if target not in levels:
        raise ConfigError(
            f"TensorRT does not build for {target!r} on this GPU",
            f"Known here: {', '.join(levels)}.",
        )
    return levels[target]


def _set_compute_capabilities(module: Any, config: Any, target: str) -> None:
    known = {
        name.lower(): value
        for name, value in module.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    names = target.split("+")
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"{module.__name__} {module.__version__} does not build for {unknown[0]!r}",
            f"Known: {ANY_TARGET}, {', '.join(known)}; join several with '+'.",
        )
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(known[name], index)
