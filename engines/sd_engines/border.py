"""What every engine checks where arrays come in, and says when its package or itself is gone.

Checks happen here, at the border; `Binding.run` has none.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sd_engines.errors import BackendError, BundleError, ConfigError, nearest
from sd_engines.node import REMAKE_HINT
from sd_engines.spec import BATCH, PICTURES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sd_engines.spec import Precision, TensorSpec

MEMORY_HINT: Final = "Check the memory that is free, or name another backend."
Rows: TypeAlias = tuple[int, int]
"""How many rows, and of how many pictures."""


def import_package(module: str, *, extra: str) -> Any:
    """Import a backend's package; `BackendError` names the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"the package {module} cannot be imported: {error}",
            f'pip install "sd-toolkit[{extra}]"',
        ) from error


def check_package(module: str, *, extra: str) -> None:
    """The same error before work that will need it, with nothing imported yet."""
    if importlib.util.find_spec(module) is None:
        raise BackendError(
            f"the package {module} is not installed", f'pip install "sd-toolkit[{extra}]"'
        )


def closed_error() -> BackendError:
    """The error of a call on an engine after its ``close``."""
    return BackendError("the engine is closed", "Open it again: open_engine(bundle, component).")


def check_batch(batch: int, max_batch: int, *, pictures: int | None = None) -> None:
    """``batch`` must be within the profile, and of as many rows a picture; else `ConfigError`."""
    if pictures is not None and (pictures < 1 or batch % pictures):
        raise ConfigError(
            f"{batch} rows are not shared by {pictures} pictures",
            "Give as many rows for each picture.",
        )
    if not 1 <= batch <= max_batch:
        raise ConfigError(
            f"batch {batch} is outside 1 to {max_batch}, what the bundle's profile holds",
            "Make fewer pictures per call, or a bundle with a larger --batch-size.",
        )


def shape_at(spec: TensorSpec, batch: int, pictures: int | None = None) -> tuple[int, ...]:
    """The shape of ``spec`` for ``batch`` rows of so many ``pictures``, None: one row each."""
    sizes = {BATCH: batch, PICTURES: pictures or batch}
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def check_arrays(
    inputs: Mapping[str, TensorSpec], arrays: Mapping[str, Any], max_batch: int
) -> Rows:
    """Names, dtypes and shapes of ``arrays`` must be those of ``inputs``; rows and pictures.

    `ConfigError` names the array that is wrong.
    """
    for name in arrays:
        if name not in inputs:
            raise ConfigError(f"the engine has no input {name!r}", nearest(name, inputs))
    for name, spec in inputs.items():
        if name not in arrays:
            raise ConfigError(f"input {name!r} is missing", f"Inputs: {', '.join(inputs)}.")
        array = arrays[name]
        dtype = getattr(array, "dtype", None)
        if dtype != spec.dtype:
            raise ConfigError(
                f"input {name!r} is {dtype or type(array).__name__}, not {spec.dtype}",
                f"Convert it: array.astype({spec.dtype!r}).",
            )
    pictures = _rows(inputs, arrays, PICTURES)
    batch = _rows(inputs, arrays, BATCH)
    if batch is None:
        batch = 1 if pictures is None else pictures
    check_batch(batch, max_batch, pictures=pictures)
    for name, spec in inputs.items():
        if arrays[name].shape != shape_at(spec, batch, pictures):
            raise ConfigError(
                f"input {name!r} has shape {arrays[name].shape}, not {spec.shape}",
                "Axis 0 is the same wherever it has the same name; the others are fixed by the "
                "profile.",
            )
    return batch, batch if pictures is None else pictures


def _rows(inputs: Mapping[str, TensorSpec], arrays: Mapping[str, Any], axis: str) -> int | None:
    """The length of ``axis`` in the first array that has it; None where none has."""
    for name, spec in inputs.items():
        if spec.shape and spec.shape[0] == axis and arrays[name].shape:
            return int(arrays[name].shape[0])
    return None


def check_graph(
    kind: str, specs: Mapping[str, TensorSpec], found: Iterable[tuple[str, str, int]]
) -> None:
    """The graph's own (name, dtype, rank) must be what the manifest says; else `BundleError`."""
    expected, actual = {(s.name, s.dtype, len(s.shape)) for s in specs.values()}, set(found)
    if expected != actual:
        raise BundleError(
            f"the graph's {kind} are {sorted(actual)}, the manifest's {sorted(expected)}",
            REMAKE_HINT,
        )


def computed_in(
    graph: Precision, asked: Precision | None, *, backend: str, on_gpu: bool
) -> Precision:
    """What ``backend``, which computes what a graph says, makes of one in ``graph``.

    That, or tf32 of fp32 ``on_gpu``. `ConfigError` for anything else that is ``asked`` for.
    """
    if asked is None or asked == graph or (on_gpu and (graph, asked) == ("fp32", "tf32")):
        return asked or graph
    raise ConfigError(
        f"{backend} computes in the precision of the graph, {graph}, not {asked}",
        f"Export with --precision {asked}, or name another backend.",
    )
