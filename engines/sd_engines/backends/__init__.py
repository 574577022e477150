"""One module per backend: how its engines are built, and how they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd_engines.backends.onnxruntime import OnnxRuntimeEngine
    from sd_engines.backends.openvino import OpenVinoEngine
    from sd_engines.backends.tensorrt import TensorRtEngine
    from sd_engines.engine import Engine

    # Makes the type checker hold each against the protocol.
    _ENGINES: tuple[type[Engine], ...] = (OnnxRuntimeEngine, OpenVinoEngine, TensorRtEngine)
