"""``sd-export triton``: a bundle as a model repository of Triton Inference Server.

Every graph becomes a model of its own, and a Python model runs the loop over them.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from sd_engines.bundle import MANIFEST_NAME, open_bundle
from sd_engines.engine import listed_engines
from sd_engines.errors import BundleError, ConfigError, ExportError, nearest
from sd_engines.spec import STABLE_DIFFUSION_XL
from sd_runtime.engines import drawing_components
from sd_runtime.pipeline import TOKENIZER_OF
from sd_runtime.task import TEXT_TO_IMAGE, check_served, tasks_of
from sd_runtime.triton import GRAPHS, OPTIONS

if TYPE_CHECKING:
    from sd_engines.bundle import Bundle
    from sd_engines.entries import EngineEntry
    from sd_engines.spec import TensorSpec

MODEL = "stable_diffusion"
"""The Python model; the graphs are called ``stable_diffusion_unet`` and so on."""
FILE_NAMES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
"""By backend, which Triton calls by the same names."""
_TYPES = {"float32": "FP32", "int64": "INT64", "bool": "BOOL"}
_OPTION_TYPES = {
    "negative_prompt": "STRING",
    "seed": "UINT64",
    "num_inference_steps": "INT32",
    "guidance_scale": "FP32",
    "scheduler": "STRING",
}
_MODEL_PY = '''"""Triton's entry point; sd-toolkit is installed where Triton's Python finds it."""

from sd_runtime.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_model_repository(bundle_path: Path, repository: Path, *, backend: str | None) -> None:
    """Write what text-to-image needs of a bundle to ``repository``, which must not be there yet.

    ``backend`` is ``onnxruntime`` or ``tensorrt``; None takes the first that the bundle has.
    Raises `ConfigError` for another, `BundleError` where the bundle lacks an engine of it.
    """
    bundle = open_bundle(bundle_path)
    check_served(bundle.manifest)
    tasks = tasks_of(bundle.manifest)
    if TEXT_TO_IMAGE.name not in tasks:
        raise ConfigError(
            f"the bundle is for {tasks[0]}, and the model repository is for text-to-image",
            "Serve it with sd-serve.",
        )
    if bundle.manifest.model.family == STABLE_DIFFUSION_XL:
        raise ConfigError(
            "the model repository is for Stable Diffusion v1 and v2, and the bundle is of XL",
            "Serve it with sd-serve.",
        )
    engines = _engines(bundle, backend)
    if repository.exists():
        raise ConfigError(f"{repository} is there already", "Remove it, or name another folder.")
    if not repository.parent.is_dir():
        raise ConfigError(
            f"there is no folder {repository.parent}",
            f"Make it: mkdir -p {quote(str(repository.parent))}.",
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".triton-", dir=repository.parent) as folder:
            staging = Path(folder) / "repository"
            for component, engine in engines.items():
                _write_graph(staging / f"{MODEL}_{component}", bundle, engine)
            _write_loop(staging / MODEL, bundle, next(iter(engines.values())).backend)
            staging.rename(repository)
    except OSError as error:
        raise ExportError(
            f"cannot write {repository}: {error}",
            "Free some space or choose another place; nothing was kept.",
            component="bundle",
            stage="triton",
        ) from error


def _engines(bundle: Bundle, backend: str | None) -> dict[str, EngineEntry]:
    """The engine of every component that is needed, of one backend, version and target.

    Of several the one that a pipeline takes: `listed_engines`.
    """
    if backend not in (None, *FILE_NAMES):
        raise ConfigError(
            f"Triton has no backend {backend!r}", nearest(str(backend), set(FILE_NAMES))
        )
    manifest = bundle.manifest
    required = drawing_components(manifest)
    needed = [name for name in GRAPHS if name in required or name in manifest.components]
    for name in (backend,) if backend else FILE_NAMES:
        alike: dict[tuple[str, str], dict[str, EngineEntry]] = {}
        for component in needed:
            for engine in listed_engines(bundle, component, backend=name):
                group = alike.setdefault((engine.version, engine.target), {})
                group.setdefault(component, engine)
        for engines in alike.values():
            if engines.keys() >= set(needed):
                return {component: engines[component] for component in needed}
    raise BundleError(
        f"{bundle.path} has no engines of {backend or ' or '.join(FILE_NAMES)} that go together",
        f"Add them: sd-export build {quote(str(bundle.path))} --backend {backend or 'onnxruntime'}",
    )


def _write_graph(model: Path, bundle: Bundle, engine: EngineEntry) -> None:
    version = model / "1"
    version.mkdir(parents=True)
    entry = bundle.manifest.components[engine.component]
    file_name = FILE_NAMES[engine.backend]
    source = bundle.verified_engine(engine)
    shutil.copyfile(source, version / file_name)
    if engine.backend == "onnxruntime":
        for name in (name for name in entry.files if not name.endswith(".onnx")):  # its weights
            shutil.copyfile(bundle.path / name, version / Path(name).name)
    config = [
        f'name: "{model.name}"',
        f'backend: "{engine.backend}"',
        f'default_model_filename: "{file_name}"',
        # Inputs of one request may differ in their first axis, which Triton's own batching forbids.
        "max_batch_size: 0",
        *(_graph_tensor("input", spec) for spec in entry.inputs),
        *(_graph_tensor("output", spec) for spec in entry.outputs),
    ]
    (model / "config.pbtxt").write_text("\n".join(config) + "\n")


def _write_loop(model: Path, bundle: Bundle, backend: str) -> None:
    version = model / "1"
    tokenizer = TOKENIZER_OF["text_encoder"]
    (version / tokenizer).parent.mkdir(parents=True)
    shutil.copyfile(bundle.verified_path(tokenizer), version / tokenizer)
    shutil.copyfile(bundle.path / MANIFEST_NAME, version / MANIFEST_NAME)
    (version / "model.py").write_text(_MODEL_PY)
    profile = bundle.manifest.profile
    config = [
        f'name: "{model.name}"',
        'backend: "python"',
        "max_batch_size: 0",
        _tensor("input", "prompt", "STRING", "1"),
        *(_tensor("input", name, _OPTION_TYPES[name], "1", "optional: true") for name in OPTIONS),
        _tensor("output", "image", "UINT8", f"{profile.height}, {profile.width}, 3"),
        _tensor("output", "recipe", "STRING", "1"),
        f'parameters {{ key: "backend" value: {{ string_value: "{backend}" }} }}',
        "instance_group { kind: KIND_CPU }",
    ]
    (model / "config.pbtxt").write_text("\n".join(config) + "\n")


def _graph_tensor(kind: str, spec: TensorSpec) -> str:
    dims = ", ".join("-1" if isinstance(size, str) else str(size) for size in spec.shape)
    return _tensor(kind, spec.name, _TYPES[spec.dtype], dims)


def _tensor(kind: str, name: str, type_: str, dims: str, more: str = "") -> str:
    return f'{kind} {{ name: "{name}" data_type: TYPE_{type_} dims: [{dims}] {more}'.rstrip() + " }"
