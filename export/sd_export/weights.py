"""Reads weight files without running anything that is in them, one tensor at a time.

``.safetensors`` cannot hold code. ``.bin`` and ``.ckpt`` are pickles: torch's weights-only reader
rebuilds tensors and plain containers and refuses every other name. Training frameworks leave
class names beside the weights; those few are answered with an inert stand-in, never imported.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import safetensors
import torch

from sd_engines.closing import Closing
from sd_engines.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_TRAINING_CLASSES = re.compile(r"(pytorch_lightning|lightning)(\.\w+)+")
_DOWNLOAD_HINT = "Download the file again; its size or its bytes are not what was published."


class Place(NamedTuple):
    """Where a weight lies: a tensor by its name in the file, or one of its ``parts`` equal parts.

    Parts are of the first axis. ``transposed`` says that the file holds it the other way round.
    """

    name: str
    part: int = 0
    parts: int = 1
    transposed: bool = False


class _TrainingObject:
    """Stands in for a training framework's object: holds nothing, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        del args, kwargs
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        del state


class Weights(Closing):
    """The tensors of one or more files by name, read from the disk when asked for.

    ``notes`` are what the files say beside them: the metadata of a safetensors header, a pickle's
    whole numbers, all as text.
    """

    def __init__(self, paths: tuple[Path, ...], *, component: str) -> None:
        self._component = component
        self.notes: dict[str, str] = {}
        self._files: list[Any] = []
        self._where: dict[str, Any] = {}
        for path in paths:
            if path.suffix == ".safetensors":
                handle = self._open_safetensors(path)
                self._files.append(handle)
                self._where.update(dict.fromkeys(handle.keys(), handle))
                self.notes.update(handle.metadata() or {})
            else:
                self._where.update(self._open_pickle(path))

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor ``name``, without reading it."""
        holder = self._where[name]
        if isinstance(holder, torch.Tensor):
            return tuple(holder.shape)
        return tuple(holder.get_slice(name).get_shape())

    def count(self, prefix: str) -> int:
        """How many consecutive numbers follow ``prefix``; `KeyError` where none does."""
        found = [name[len(prefix) :].split(".")[0] for name in self if name.startswith(prefix)]
        if not found:
            raise KeyError(prefix)
        return 1 + max(map(int, found))

    def tensor(self, place: Place) -> torch.Tensor:
        """The tensor at ``place`` as stored."""
        holder = self._where[place.name]
        stored = holder if isinstance(holder, torch.Tensor) else holder.get_tensor(place.name)
        whole: torch.Tensor = stored
        if place.parts > 1:
            return whole.tensor_split(place.parts)[place.part]
        return whole.T if place.transposed else whole

    def close(self) -> None:
        """Let go of the files."""
        self._where.clear()
        self._files.clear()

    def _open_safetensors(self, path: Path) -> Any:
        try:
            return safetensors.safe_open(path, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise self._error(f"cannot read {path.name}: {error}", _DOWNLOAD_HINT) from error

    def _open_pickle(self, path: Path) -> dict[str, torch.Tensor]:
        try:
            state = _load_pickle(path)
        except pickle.UnpicklingError as error:
            raise self._error(
                f"{path.name} is a pickle that asks for more than tensors, and was not run: "
                f"{_refused_name(error)}",
                "Use the checkpoint's .safetensors file, or a .ckpt of weights only.",
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # junk makes the reader raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self._error(f"cannot read {path.name}: {reason}", _DOWNLOAD_HINT) from error
        if isinstance(state, dict):
            self.notes |= {str(k): str(v) for k, v in state.items() if type(v) is int}
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if isinstance(state, dict) and isinstance(state.get("string_to_param"), dict):
            if isinstance(state.get("name"), str):  # a textual inversion of AUTOMATIC1111's
                self.notes["name"] = state["name"]
            state = {f"string_to_param.{k}": v for k, v in state["string_to_param"].items()}
        if not isinstance(state, dict):
            raise self._error(f"{path.name} holds no weights", "Name a checkpoint's weight file.")
        return {k: v for k, v in state.items() if isinstance(k, str) and torch.is_tensor(v)}

    def _error(self, message: str, hint: str) -> ExportError:
        return ExportError(message, hint, component=self._component, stage="load")


def _load_pickle(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mapped else []
    inert: list[Any] = [(_TrainingObject, name) for name in names if _is_training_class(name)]
    with torch.serialization.safe_globals(inert), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a pickle's protocol, and on torch's own internals
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)


def _is_training_class(name: str) -> bool:
    return _TRAINING_CLASSES.fullmatch(name) is not None


def _refused_name(error: pickle.UnpicklingError) -> str:
    match = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"global (\S+)", str(error))
    return match.group(1) if match else "an unsupported instruction"
