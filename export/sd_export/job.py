"""One export's work: each component loaded, traced, saved, built and proven, then the next.

At no time are two models in memory, nor a model and its engine. Each stage is recorded with a key
over all it depends on, so that an interrupted export goes on where it stopped.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_engines.bundle import (
    MANIFEST_NAME,
    PORTABLE_BACKENDS,
    CertificateEntry,
    ComponentEntry,
    EngineEntry,
    FileEntry,
    Manifest,
    hash_files,
)
from sd_engines.engine import build_engine
from sd_engines.errors import BackendError, EngineMismatchError, ExportError
from sd_engines.spec import ModelSpec, TensorSpec
from sd_export.build import recorded_engine, verify_graph, words_of
from sd_export.license import copy_license
from sd_export.precision import coarser, engine_precision, graph_precision
from sd_export.work import key_of, versions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sd_engines.spec import Precision, Profile
    from sd_export.progress import StageLog
    from sd_export.source import Checkpoint
    from sd_export.verify import Proof
    from sd_export.work import WorkFolder

RECORD_FILE = "export.json"
"""What a bundle was made from and how long each stage took; its key tells a rerun that a bundle
is already what is asked for."""


class Job:
    """What is made, of what, and where."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        profile: Profile,
        backends: tuple[str, ...],
        precision: Precision | None,
        *,
        work: WorkFolder,
        log: StageLog,
    ) -> None:
        self.checkpoint = checkpoint
        self.profile = profile
        self.backends = backends
        self.precision = precision
        self.work = work
        self.log = log
        self.versions = versions(backends)
        with log.stage("checkpoint", "hash") as result:
            self._weights = _weight_hashes(checkpoint)
            result.bytes = _stored_bytes(checkpoint)
        self._made_of = {
            "code": _folder_hashes(Path(__file__).parent),
            "configs": checkpoint.configs,
            "profile": asdict(profile),
            "versions": self.versions,
        }
        self.key = key_of(
            {
                **self._made_of,
                "backends": backends,
                "license": checkpoint.license,
                "licenses": [path.read_text("utf-8", "replace") for path in checkpoint.licenses],
                "precision": precision,
                "revision": checkpoint.revision,
                "source": checkpoint.source,
                "tokenizer": _folder_hashes(checkpoint.tokenizer),
                "weights": self._weights,
            }
        )

    def check_room(self) -> None:
        """`ExportError` where the disk plainly has no room for the graphs."""
        needed = _stored_bytes(self.checkpoint)
        free = shutil.disk_usage(self.work.path).free
        if free < needed:
            raise ExportError(
                f"the disk has {free / 1e9:.1f} GB free, the bundle needs {needed / 1e9:.1f} GB "
                "or more",
                "Make room, or name an --output on another disk.",
                component="bundle",
                stage="save",
            )

    def run(self) -> Manifest:
        """Make and prove every part; the manifest of the bundle, which is complete but for it."""
        from sd_export.wrappers import COMPONENTS

        files = self._write_small_files()
        components: dict[str, ComponentEntry] = {}
        engines: list[EngineEntry] = []
        certificate: list[CertificateEntry] = []
        for component in COMPONENTS:
            if component == "safety_checker" and not self.checkpoint.has_safety_checker:
                continue
            components[component] = self._graph(component)
            made, measured = self._engines(component, components[component])
            engines += made
            certificate += measured
        manifest = Manifest(
            model=self._model(),
            profile=self.profile,
            components=components,
            engines=tuple(engines),
            certificate=tuple(certificate),
            files=files,
            versions=self.versions,
        )
        certificate += self._end_to_end(manifest)
        files |= self._write_record()
        listed = {*files, *(e.file for e in engines)}
        for entry in components.values():
            listed.update(entry.files)
        self.work.remove_strays(listed)
        return replace(manifest, certificate=tuple(certificate), files=files)

    def _write_small_files(self) -> dict[str, FileEntry]:
        """Tokenizer, scheduler config and licence."""
        from sd_export.load import load_tokenizer

        bundle = self.work.bundle
        tokenizer = load_tokenizer(self.checkpoint)
        known = int(self.checkpoint.configs["text_encoder"]["vocab_size"])
        if tokenizer.get_vocab_size() > known:
            raise ExportError(
                f"has {tokenizer.get_vocab_size()} tokens, the text encoder knows {known}",
                "They are of different models; download the checkpoint again.",
                component="tokenizer",
                stage="load",
            )
        (bundle / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(str(bundle / "tokenizer" / "tokenizer.json"))
        (bundle / "scheduler").mkdir(exist_ok=True)
        scheduler = json.dumps(dict(self.checkpoint.configs["scheduler"]), indent=2)
        (bundle / "scheduler" / "scheduler_config.json").write_text(scheduler + "\n")
        names = ["tokenizer/tokenizer.json", "scheduler/scheduler_config.json"]
        return hash_files(bundle, names + copy_license(self.checkpoint, bundle))

    def _graph(self, component: str) -> ComponentEntry:
        """The component's ONNX and its reference outputs, made or found."""
        from sd_export.wrappers import MODEL_OF

        precision = graph_precision(component, self.backends, self.precision)
        key = key_of(
            {
                **self._made_of,
                "component": component,
                "precision": precision,
                "weights": self._weights[MODEL_OF.get(component, component)],
            }
        )
        stage = f"{component} onnx"
        done = self.work.finished(stage, key)
        if done is not None:
            entry = _component_entry(done)
            size = sum(file.bytes for file in entry.files.values())
            self.log.skipped(component, "trace", size=size)
            return entry
        border = self._trace(component, precision)
        gc.collect()
        folder = self.work.bundle / component
        names = [f"{component}/{path.name}" for path in sorted(folder.iterdir())]
        data = {
            **border,
            "file": f"{component}/model.onnx",
            "files": {n: asdict(e) for n, e in hash_files(self.work.bundle, names).items()},
            "precision": precision,
        }
        made = [*(f"bundle/{name}" for name in names), f"reference/{component}.safetensors"]
        self.work.finish(stage, key, files=made, data=data)
        return _component_entry(data)

    def _trace(self, component: str, precision: Precision) -> dict[str, Any]:
        """Load, run for reference, trace and save; the border. The model is gone afterwards."""
        import numpy as np
        from safetensors.numpy import save_file

        from sd_export import verify, wrappers
        from sd_export.load import load_model
        from sd_export.onnx_export import OPSET, save, trace
        from sd_export.onnx_passes import to_half

        checkpoint, profile, log = self.checkpoint, self.profile, self.log
        name = wrappers.MODEL_OF.get(component, component)
        with log.stage(component, "load") as result:
            model = load_model(checkpoint, name)
            result.bytes = sum(p.numel() * p.element_size() for p in model.parameters())
            module = wrappers.wrap(component, model, checkpoint=checkpoint, profile=profile)
        inputs, outputs = wrappers.borders(component, checkpoint=checkpoint, profile=profile)
        with log.stage(component, "reference"):
            probe = verify.probe_inputs(
                component, inputs, profile=profile, vocab_size=self._vocab_size()
            )
            reference = verify.reference_outputs(
                module, component, probe, outputs, checkpoint=checkpoint, model=model
            )
            path = self.work.path / "reference" / f"{component}.safetensors"
            path.parent.mkdir(exist_ok=True)
            tensors = {f"in.{name}": array for name, array in probe.items()}
            tensors |= {f"out.{name}": array for name, array in reference.items()}
            save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, path)
        with log.stage(component, "trace"):
            graph = trace(module, component=component, inputs=inputs, outputs=outputs)
        if precision != "fp32":
            with log.stage(component, f"convert to {precision}"):
                to_half(graph, precision)
        with log.stage(component, "save") as result:
            result.bytes = save(graph, self.work.bundle / component)
        return {
            "opset": OPSET,
            "inputs": [asdict(spec) for spec in inputs],
            "outputs": [asdict(spec) for spec in outputs],
        }

    def _engines(
        self, component: str, entry: ComponentEntry
    ) -> tuple[list[EngineEntry], list[CertificateEntry]]:
        """Engines of all backends, and what was measured of them."""
        onnx_path = self.work.bundle / entry.file
        engines: list[EngineEntry] = []
        certificate: list[CertificateEntry] = []
        proof = cache(partial(self._proof, component))
        made_of = {"graph": asdict(entry), "versions": self.versions}
        if not any(backend in PORTABLE_BACKENDS for backend in self.backends):
            key = key_of(made_of)
            done = self.work.finished(f"{component} proof", key)
            if done is None:
                measured = verify_graph(
                    onnx_path,
                    component=component,
                    entry=entry,
                    profile=self.profile,
                    proof=proof,
                    log=self.log,
                )
                done = {"certificate": asdict(measured)}
                self.work.finish(f"{component} proof", key, files=[], data=done)
            certificate.append(CertificateEntry(**done["certificate"]))
        for backend in self.backends:
            engine, measures = recorded_engine(
                self.work,
                backend,
                onnx_path,
                component=component,
                entry=entry,
                profile=self.profile,
                precision=engine_precision(
                    component, backend, graph=entry.precision, precision=self.precision
                ),
                proof=proof,
                log=self.log,
            )
            engines.append(engine)
            certificate += measures
        return engines, certificate

    def _proof(self, component: str) -> Proof:
        from safetensors.numpy import load_file

        from sd_export.verify import Proof

        arrays = load_file(self.work.path / "reference" / f"{component}.safetensors")
        return Proof(
            inputs={n.removeprefix("in."): a for n, a in arrays.items() if n.startswith("in.")},
            reference={
                n.removeprefix("out."): a for n, a in arrays.items() if n.startswith("out.")
            },
            reference_name=self._reference_name(),
        )

    def _end_to_end(self, manifest: Manifest) -> list[CertificateEntry]:
        """A picture through the runtime against diffusers' own, by every backend that runs here."""
        from sd_export.verify import reference_picture, verify_end_to_end

        key = key_of({"job": self.key, "engines": [asdict(engine) for engine in manifest.engines]})
        done = self.work.finished("end to end", key)
        if done is not None:
            self.log.skipped("end_to_end", "verify")
            return [CertificateEntry(**measured) for measured in done["certificate"]]
        with self.log.stage("end_to_end", "reference"):
            reference = reference_picture(self.checkpoint, self.profile)
        gc.collect()
        certificate: list[CertificateEntry] = []
        backends = self.backends
        if not any(backend in PORTABLE_BACKENDS for backend in backends):
            manifest = self._with_onnxruntime(manifest)
            backends = (*backends, "onnxruntime")
        path = self.work.bundle / MANIFEST_NAME
        path.write_text(manifest.to_json(), encoding="utf-8")
        try:
            for backend in backends:
                (precision,) = {
                    coarser(manifest.components["unet"].precision, engine.precision)
                    for engine in manifest.engines
                    if engine.component == "unet" and engine.backend == backend
                }
                try:
                    with self.log.stage("end_to_end", f"verify {backend}") as result:
                        measured = verify_end_to_end(
                            self.work.bundle,
                            backend=backend,
                            precision=precision,
                            reference=reference,
                            reference_name=self._reference_name(),
                        )
                        result.detail = words_of(measured)
                    certificate.append(measured)
                except (BackendError, EngineMismatchError) as error:
                    if backend in PORTABLE_BACKENDS:
                        raise
                    self.log.skipped(
                        "end_to_end",
                        f"verify {backend}",
                        detail=f"cannot run here: {error.message}",
                    )
        finally:
            path.unlink()
        data = {"certificate": [asdict(measured) for measured in certificate]}
        self.work.finish("end to end", key, files=[], data=data)
        return certificate

    def _with_onnxruntime(self, manifest: Manifest) -> Manifest:
        """``manifest`` with engines of ONNX Runtime too, which run its graphs anywhere."""
        engines = [
            build_engine(
                "onnxruntime",
                self.work.bundle / entry.file,
                output_dir=self.work.bundle,
                component=component,
                entry=entry,
                profile=self.profile,
            )
            for component, entry in manifest.components.items()
        ]
        return replace(manifest, engines=(*manifest.engines, *engines))

    def _write_record(self) -> dict[str, FileEntry]:
        from sd_export.progress import peak_bytes

        record = {
            "key": self.key,
            "source": self.checkpoint.source,
            "revision": self.checkpoint.revision,
            "peak_bytes": peak_bytes(),
            "stages": [asdict(event) for event in self.log.ended],
        }
        path = self.work.bundle / RECORD_FILE
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return hash_files(self.work.bundle, [RECORD_FILE])

    def _model(self) -> ModelSpec:
        from sd_export.load import max_prompt_tokens
        from sd_export.wrappers import vae_scaling_factor

        checkpoint = self.checkpoint
        scheduler = dict(checkpoint.configs["scheduler"])
        return ModelSpec(
            source=checkpoint.source,
            revision=checkpoint.revision,
            family=checkpoint.family,
            license=checkpoint.license,
            prediction_type=str(scheduler.get("prediction_type", "epsilon")),
            latent_channels=int(checkpoint.configs["unet"].get("in_channels", 4)),
            vae_scaling_factor=vae_scaling_factor(checkpoint),
            max_prompt_tokens=max_prompt_tokens(checkpoint),
            scheduler=scheduler,
        )

    def _vocab_size(self) -> int:
        return int(self.checkpoint.configs["text_encoder"]["vocab_size"])

    def _reference_name(self) -> str:
        return f"diffusers {self.versions['diffusers']}, fp32"


def _component_entry(data: Mapping[str, Any]) -> ComponentEntry:
    """The entry from its record."""

    def specs(key: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in data[key])

    return ComponentEntry(
        file=data["file"],
        files={name: FileEntry(**entry) for name, entry in data["files"].items()},
        precision=data["precision"],
        opset=data["opset"],
        inputs=specs("inputs"),
        outputs=specs("outputs"),
    )


def _stored_bytes(checkpoint: Checkpoint) -> int:
    paths = {path for paths in checkpoint.weights.values() for path in paths}
    return sum(path.stat().st_size for path in paths)


def _weight_hashes(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """SHA-256 of every weight file, by model; each file is read once."""
    paths = list(dict.fromkeys(path for paths in checkpoint.weights.values() for path in paths))
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = dict(zip(paths, pool.map(_file_hash, paths), strict=True))
    return {model: [found[p] for p in files] for model, files in checkpoint.weights.items()}


def _folder_hashes(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    return {path.name: _file_hash(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
