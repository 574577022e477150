"""Builds TensorRT and TensorRT-RTX plans from a bundle's ONNX.

Networks are strongly typed: precision is that of the graph. TensorRT-RTX builds where there is no
GPU; TensorRT needs the GPU that will run the plan.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sd_engines.backends.tensorrt_package import failure, package, package_log
from sd_engines.backends.tensorrt_target import aim, default_target
from sd_engines.border import computed_in, shape_at
from sd_engines.bundle import engine_entry, engine_file, hash_files
from sd_engines.cache import cached_file, read_cached, write_cached
from sd_engines.errors import BackendError

if TYPE_CHECKING:
    from pathlib import Path

    from sd_engines.engine import Progress
    from sd_engines.entries import ComponentEntry, EngineEntry
    from sd_engines.spec import Precision, Profile


def build(
    onnx_path: Path,
    *,
    output_dir: Path,
    backend: str,
    component: str,
    entry: ComponentEntry,
    profile: Profile,
    precision: Precision | None = None,
    target: str | None = None,
    progress: Progress | None = None,
    workspace_bytes: int | None = None,
    calibration: str | None = None,
) -> EngineEntry:
    """Build ``output_dir/engines/<backend>-<version>-<target>/<component>.engine``.

    ``target`` None: TensorRT's is for GPUs like this one, TensorRT-RTX's for any; `tensorrt_target`
    says what else there is. The batch axis takes 1 to the profile's largest, tuned for it and for
    guidance. ``workspace_bytes`` is the most memory that a layer may work in; None is all of the
    GPU's. ``calibration`` is kept among the entry's flags. What TensorRT measures is remembered for
    its next build.
    `ConfigError` for a precision the graph has not or a target the package does not know;
    `BackendError` with the parser's or builder's own words where it fails.
    """
    module = package(backend)
    precision = computed_in(entry.precision, precision, backend=backend, on_gpu=True)
    log = package_log(module)
    log.errors.clear()
    target = target or default_target(backend)
    builder = module.Builder(log)
    network = _parse(module, builder, onnx_path, log)
    config = builder.create_builder_config()
    if precision != "tf32":
        config.clear_flag(module.BuilderFlag.TF32)  # on by default
    if workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, workspace_bytes)
    if backend == "tensorrt-rtx":
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else it may not be captured
    aim(module, config, backend, target)
    shapes = _optimization_profile(builder, component, entry, profile)
    if config.add_optimization_profile(shapes) < 0:
        raise failure(f"{backend} refuses the profile of {component}", log)
    remembered = cached_file(f"{backend}-{module.__version__}-{target}.timings")
    timings = None
    if backend == "tensorrt":  # TensorRT-RTX measures nothing
        timings = _timing_cache(config, remembered)
    config.progress_monitor = monitor = _monitor(module, progress)
    plan = builder.build_serialized_network(network, config)
    if monitor.stopped_by is not None:
        raise monitor.stopped_by
    if plan is None:
        raise failure(f"{backend} cannot build {component}", log)
    if timings is not None:
        write_cached(remembered, bytes(memoryview(timings.serialize())))
    file = engine_file(
        component,
        entry,
        backend,
        version=module.__version__,
        target=target,
        precision=precision,
    )
    _write(output_dir / file, plan)
    return engine_entry(
        component,
        entry,
        profile,
        backend,
        version=module.__version__,
        target=target,
        precision=precision,
        file=file,
        built=hash_files(output_dir, [file])[file],
        flags={
            "workspace_bytes": str(workspace_bytes or "all"),
            **({"calibration": calibration} if calibration else {}),
        },
    )


def _optimization_profile(
    builder: Any, component: str, entry: ComponentEntry, profile: Profile
) -> Any:
    """From one row to as many as there may be, which it is tuned for."""
    shapes = builder.create_optimization_profile()
    max_batch = profile.max_batch(component, entry.inputs)
    for spec in entry.inputs:
        if isinstance(spec.shape[0], str):
            usual = shape_at(spec, max_batch, profile.batch_size)
            shapes.set_shape(spec.name, shape_at(spec, 1), usual, shape_at(spec, max_batch))
    return shapes


def _timing_cache(config: Any, remembered: Path | None) -> Any:
    """What is ``remembered``, given to ``config``; a new one where that is refused."""
    for known in (read_cached(remembered), b""):  # it may be of another card
        timings = config.create_timing_cache(known)
        if timings and config.set_timing_cache(timings, False):
            break
    return timings


def _write(path: Path, plan: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(memoryview(plan))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise BackendError(
            f"{path}: {error}", "Make room on the disk, then run it again."
        ) from error


def _parse(module: Any, builder: Any, onnx_path: Path, log: Any) -> Any:
    strongly_typed = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = module.OnnxParser(network, log)
    if not parser.parse_from_file(os.fspath(onnx_path)):  # a path: it finds the external data
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        words = [f"{e.node_operator()} {e.node_name()}: {e.desc()}".lstrip(" :") for e in errors]
        raise failure(f"{module.__name__} cannot parse {onnx_path}", log, words)
    _let_attention_decompose(module, network)
    return network


def _let_attention_decompose(module: Any, network: Any) -> None:
    """Where no fused kernel takes an Attention (fp32, small heads), let it be its parts.

    Without leave to do so the builder fails; with it, it still takes a fused kernel where one fits.
    """
    attention = getattr(module.LayerType, "ATTENTION_INPUT", None)
    for layer in map(network.get_layer, range(network.num_layers)):
        if attention is not None and layer.type == attention:
            layer.__class__ = module.IAttentionInputLayer  # the bindings' way to cast a layer
            layer.attention.decomposable = True


def _monitor(module: Any, progress: Progress | None) -> Any:
    """Progress of a build; what ``progress`` raises, KeyboardInterrupt too, stops the build."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped_by: BaseException | None = None

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self.steps[name] = num_steps
            self.report(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self.report(name, step + 1)
            return self.stopped_by is None

        def phase_finish(self, name: str) -> None:
            self.report(name, self.steps.get(name, 1))

        def report(self, name: str, done: int) -> None:
            try:
                if progress is not None and self.stopped_by is None:
                    progress(name, done, max(self.steps.get(name, 1), 1))
            except BaseException as error:  # it must not pass through the builder's own frames
                self.stopped_by = error

    return Monitor()
