"""OpenVINO's own form of a graph (IR) in one file, for graphs that no ONNX can be written of.

OpenVINO writes two files; a bundle's engine is one: the weights, the XML, and the XML's length in
bytes as 8 bytes, little-endian. The weights come first, so that in memory they are aligned.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.backends.openvino_package import core, package
from sd_engines.errors import BackendError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_LENGTH_BYTES = 8


def write_ir(model: Any, path: Path) -> None:
    """Write ``model``, an ``openvino.Model``, at ``path``; its folder is there."""
    xml, weights = path.with_suffix(".xml"), path.with_suffix(".bin")
    package().save_model(model, os.fspath(xml), compress_to_fp16=False)
    text = xml.read_bytes()
    with weights.open("ab") as file:
        file.write(text + len(text).to_bytes(_LENGTH_BYTES, "little"))
    xml.unlink()
    weights.replace(path)


def read_ir(path: Path) -> tuple[Any, NDArray[np.uint8]]:
    """The ``openvino.Model`` at ``path``, and the mapped file, which must outlive all made of it.

    Nothing is read yet but the XML. `BackendError` where the file is no such graph.
    """
    try:
        # copy-on-write, for OpenVINO takes no read-only memory
        mapped = np.memmap(path, np.uint8, mode="c")
        end = len(mapped) - _LENGTH_BYTES
        begin = end - int.from_bytes(mapped[max(end, 0) :].tobytes(), "little")
        if not 0 < begin < end:
            raise ValueError("its end is not the length of a graph")
        text = mapped[begin:end].tobytes().decode()
        weights = package().Tensor(mapped[:begin], shared_memory=True)
        return core().read_model(text, weights), mapped
    except Exception as error:
        raise BackendError(
            f"OpenVINO cannot read {path}: {error}",
            "Build it again: sd-export build BUNDLE --backend openvino --precision int8",
        ) from error
