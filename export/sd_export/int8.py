"""The UNet in 8 bits (W8A8) for OpenVINO: weights and activations of its products, by NNCF.

SmoothQuant moves what is hard to quantise from activations into weights (Xiao et al. 2023,
https://arxiv.org/abs/2211.10438), in convolutions too. What a wrong digit would reach all pixels
through is not quantised: the first convolutions, the last, and the path of the timestep. That and
all between the products is in bf16 where the processor that measured the engine has it.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from typing import TYPE_CHECKING, Any

from sd_engines.bundle import EngineEntry, engine_entry, engine_file, hash_files
from sd_engines.errors import ConfigError, ExportError
from sd_export.memory import release
from sd_export.precision import is_quantized

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np

    from sd_engines.bundle import ComponentEntry
    from sd_engines.spec import Profile
    from sd_export.calibration import Calibration
    from sd_export.progress import StageLog
    from sd_export.verify import Proof

_SMOOTH_CONVOLUTION, _SMOOTH_MATMUL = 0.9, 0.7
"""How much of an activation's range goes into the weights: see benchmarks/README.md."""
_LARGE_LAYERS = ("Convolution", "MatMul")


def int8_engine(
    onnx_path: Path,
    *,
    output_dir: Path,
    component: str,
    entry: ComponentEntry,
    profile: Profile,
    target: str | None,
    calibration: Calibration,
    log: StageLog,
) -> tuple[EngineEntry, Proof]:
    """Draw, quantise and write ``output_dir/engines/openvino-<version>-cpu/<component>.engine``.

    Its entry, and what it can be held to. `ConfigError` for an unknown target, `ExportError` where
    NNCF fails, `BackendError` where OpenVINO does not run the graphs.
    """
    from sd_engines.backends import openvino
    from sd_engines.backends.openvino_ir import write_ir
    from sd_engines.backends.openvino_precision import computes_in

    if target not in (None, openvino.TARGET):
        raise ConfigError(f"unknown target {target!r}", f"OpenVINO runs on: {openvino.TARGET}.")
    version = openvino.version()
    target = openvino.TARGET
    file = engine_file(component, entry, openvino.BACKEND, version=version, target=target)
    path = output_dir / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with log.stage(component, "calibrate") as result:
        inputs, proof = calibration.draw()
        result.detail = f"{len(calibration.prompts)} prompts, {len(inputs)} steps"
    with log.stage(component, "quantize") as result:
        write_ir(_quantized(onnx_path, component, inputs), path)
        release()
        built = hash_files(output_dir, [file])[file]
        result.bytes = built.bytes
    engine = engine_entry(
        component,
        entry,
        profile,
        openvino.BACKEND,
        version=version,
        target=target,
        precision="int8",
        file=file,
        built=built,
        flags={
            "calibration": calibration.digest,
            "nncf": metadata.version("nncf"),
            "rest": "bf16" if computes_in("bf16") else "fp32",
        },
    )
    return engine, proof


def _quantized(onnx_path: Path, component: str, inputs: Sequence[dict[str, np.ndarray]]) -> Any:
    """The graph at ``onnx_path`` as an ``openvino.Model`` with 8-bit weights."""
    from sd_engines.backends.openvino_package import core

    with _nncf() as nncf:
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        try:
            model = core().read_model(os.fspath(onnx_path))
            return nncf.quantize(
                model,
                nncf.Dataset(inputs),
                subset_size=len(inputs),
                model_type=nncf.ModelType.TRANSFORMER,
                ignored_scope=nncf.IgnoredScope(names=_kept_exact(model)),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    disable_bias_correction=True,  # it moves nothing, and takes its time
                    # the widest range of all steps: means of them clip the last ones
                    activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(
                        convolution=_SMOOTH_CONVOLUTION, matmul=_SMOOTH_MATMUL
                    ),
                ),
            )
        except Exception as error:
            raise ExportError(
                f"NNCF cannot quantise it: {error}",
                "Leave --precision int8 out, and report it with the checkpoint's config.json.",
                component=component,
                stage="quantize",
            ) from error


def _kept_exact(model: Any) -> list[str]:
    """Names of the large layers that are not in 8 bits: not `is_quantized`, or the last one."""
    from sd_engines.backends.openvino_graph import nodes_and_inputs

    layers = [
        (node.get_friendly_name(), inputs)
        for node, inputs in nodes_and_inputs(model)
        if node.get_type_name() in _LARGE_LAYERS
    ]
    return [*(name for name, inputs in layers if not is_quantized(inputs)), layers[-1][0]]


@contextmanager
def _nncf() -> Iterator[Any]:
    """The package, kept from sending events, from printing and from warning of its own inside."""
    from sd_engines.backends.openvino_package import without_telemetry

    logger_class = logging.getLoggerClass()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with without_telemetry():
            import nncf
        logging.setLoggerClass(logger_class)  # it puts its own there
        yield nncf
