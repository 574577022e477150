"""What every engine checks where arrays come in, and says when its package or itself is gone.

Checks happen here, at the border; `Binding.run` has none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sd_engines.errors import BackendError, BundleError, ConfigError, nearest
from sd_engines.spec import BATCH

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sd_engines.spec import TensorSpec


def import_package(module: str, *, extra: str) -> Any:
    """Import a backend's package; `BackendError` names the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"the package {module} cannot be imported: {error}",
            f'pip install "sd-toolkit[{extra}]"',
        ) from error


def closed_error() -> BackendError:
    """The error of a call on an engine after its ``close``."""
    return BackendError("the engine is closed", "Open it again: open_engine(bundle, component).")


def check_batch(batch: int, max_batch: int) -> None:
    """``batch`` must be within the profile; `ConfigError` otherwise."""
    if not 1 <= batch <= max_batch:
        raise ConfigError(
            f"batch {batch} is outside 1 to {max_batch}, what the bundle's profile holds",
            "Make fewer pictures per call, or a bundle with a larger --batch-size.",
        )


def shape_at(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """The shape of ``spec`` for ``batch`` rows."""
    return tuple(batch if size == BATCH else int(size) for size in spec.shape)


def check_arrays(
    inputs: Mapping[str, TensorSpec], arrays: Mapping[str, Any], max_batch: int
) -> int:
    """Names, dtypes and shapes of ``arrays`` must be those of ``inputs``; returns the batch.

    `ConfigError` names the array that is wrong.
    """
    for name in arrays:
        if name not in inputs:
            raise ConfigError(f"the engine has no input {name!r}", nearest(name, inputs))
    batch: int | None = None
    for name, spec in inputs.items():
        if name not in arrays:
            raise ConfigError(f"input {name!r} is missing", f"Inputs: {', '.join(inputs)}.")
        array = arrays[name]
        dtype, shape = getattr(array, "dtype", None), getattr(array, "shape", None)
        if dtype != spec.dtype:
            raise ConfigError(
                f"input {name!r} is {dtype or type(array).__name__}, not {spec.dtype}",
                f"Convert it: array.astype({spec.dtype!r}).",
            )
        if batch is None and shape and spec.shape and spec.shape[0] == BATCH:
            batch = shape[0]
            check_batch(batch, max_batch)
        if shape != shape_at(spec, batch or 0):
            raise ConfigError(
                f"input {name!r} has shape {shape}, not {spec.shape}",
                f"All inputs share axis 0 ({BATCH!r}); the other axes are fixed by the profile.",
            )
    return batch or 1


def check_graph(
    kind: str, specs: Mapping[str, TensorSpec], found: Iterable[tuple[str, str, int]]
) -> None:
    """The graph's own (name, dtype, rank) must be what the manifest says; else `BundleError`."""
    expected, actual = {(s.name, s.dtype, len(s.shape)) for s in specs.values()}, set(found)
    if expected != actual:
        raise BundleError(
            f"the graph's {kind} are {sorted(actual)}, the manifest's {sorted(expected)}",
            "Make the bundle again: sd-export --model MODEL --output BUNDLE",
        )
