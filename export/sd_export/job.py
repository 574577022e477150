"""One export's work: each component loaded, traced, saved, built and proven, then the next.

At no time are two models in memory, nor a model and its engine. Each stage is recorded with a key
over all it depends on, so that an interrupted export goes on where it stopped.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from sd_engines.bundle import (
    PORTABLE_BACKENDS,
    CertificateEntry,
    ComponentEntry,
    EngineEntry,
    FileEntry,
    Manifest,
    hash_files,
)
from sd_engines.files import listed_files
from sd_engines.memory import peak_memory_bytes
from sd_export.checkpoint_files import stored_bytes
from sd_export.checkpoint_hashes import CheckpointHashes
from sd_export.end_to_end import prove_end_to_end
from sd_export.graph import recorded_graph, stored_proof
from sd_export.graph_proof import recorded_measure
from sd_export.memory import release
from sd_export.model_spec import model_spec
from sd_export.precision import engine_precision, graph_precision
from sd_export.proven_engine import EngineOrder, recorded_engine
from sd_export.small_files import write_small_files
from sd_export.work import key_of, versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sd_engines.spec import Precision, Profile
    from sd_export.checkpoint import Checkpoint
    from sd_export.progress import StageLog
    from sd_export.work import WorkFolder

RECORD_FILE = "export.json"
"""What a bundle was made from and how long each stage took; its key tells a rerun that a bundle
is already what is asked for."""
_VAE_SIDE = 512  # of a VAE whose config is silent: v1's


class Job:
    """What is made, of what, and where."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        profiles: tuple[Profile, ...],
        backends: tuple[str, ...],
        precision: Precision | None,
        *,
        vae_tiling: bool,
        calibration_prompts: Sequence[str] | None,
        feature_cache: bool,
        work: WorkFolder,
        log: StageLog,
    ) -> None:
        self.checkpoint = checkpoint
        self.profiles = profiles
        self.backends = backends
        self.precision = precision
        self.vae_tiling = vae_tiling
        self.calibration_prompts = calibration_prompts
        self.feature_cache = feature_cache
        self.work = work
        self.log = log
        self.versions = versions(backends)
        with log.stage("checkpoint", "hash") as result:
            self._hashes = CheckpointHashes(checkpoint)
            result.bytes = stored_bytes(checkpoint)
        self._made_of = {**self._hashes.made_of, "versions": self.versions}
        self.key = key_of(
            {
                **self._made_of,
                **self._hashes.described,
                "backends": backends,
                "calibration_prompts": calibration_prompts,
                "feature_cache": feature_cache,
                "precision": precision,
                "profiles": [asdict(profile) for profile in profiles],
                "vae_tiling": vae_tiling,
            }
        )

    def run(self) -> Manifest:
        """Make and prove every part; the manifest of the bundle, which is complete but for it."""
        files = write_small_files(self.checkpoint, self.work.bundle)
        blank = Manifest(
            model=model_spec(self.checkpoint),
            profile=self.profiles[0],
            components={},
            files=files,
            versions=self.versions,
        )
        manifest = self._sized(blank, None)
        others = [self._sized(replace(blank, profile=p), manifest) for p in self.profiles[1:]]
        self._hashes.check_unchanged()
        files |= self._write_record()
        manifest = replace(
            manifest, sizes=tuple(other.all_sizes[0] for other in others), files=files
        )
        self.work.remove_strays(set(listed_files(manifest)))
        return manifest

    def _sized(self, manifest: Manifest, first: Manifest | None) -> Manifest:
        """``manifest`` with all that its size needs, proven.

        Of the ``first`` size, where this is another, come the weights, and every component that
        is the same for both.
        """
        from sd_export.controlnet import control_components
        from sd_export.wrappers import components_of

        profile, log, ending = manifest.profile, self.log, ""
        if first is not None:
            ending = f"-{profile.width}x{profile.height}"
            log = log.about(ending[1:])
        own = components_of(self.checkpoint, feature_cache=self.feature_cache)
        for component in (*own, *control_components(self.checkpoint)):
            if first is not None and self._is_shared(component, profile, first.profile):
                entry = first.components[component]
                engines = [e for e in first.engines if e.component == component]
                certificate = [c for c in first.certificate if c.component == component]
                manifest = _with(manifest, component, entry, engines, certificate)
                continue
            self._hashes.check_unchanged()
            entry = self._graph(component, f"{component}/model{ending}.onnx", profile, log)
            manifest = _with(manifest, component, entry, (), ())
            engines, certificate = self._engines(component, manifest, log)
            manifest = _with(manifest, component, entry, engines, certificate)
            release()
        measured = prove_end_to_end(
            manifest,
            checkpoint=self.checkpoint,
            backends=self.backends,
            reference_name=self._reference_name(),
            key=self.key,
            work=self.work,
            log=log,
        )
        return replace(manifest, certificate=(*manifest.certificate, *measured))

    def _is_shared(self, component: str, profile: Profile, first: Profile) -> bool:
        """Whether its graph does not depend on the size: nothing at its border does."""
        from sd_export.borders import borders

        ours, theirs = (
            borders(
                component,
                checkpoint=self.checkpoint,
                profile=self._traced(component, each),
                feature_cache=self._caches(component),
            )
            for each in (profile, first)
        )
        return ours == theirs

    def _traced(self, component: str, profile: Profile) -> Profile:
        """What the graph of ``component`` is made for: of a VAE in tiles, one of them."""
        if not self.vae_tiling or component not in ("vae_decoder", "vae_encoder"):
            return profile
        side = int(self.checkpoint.configs["vae"].get("sample_size", _VAE_SIDE))
        height, width = min(profile.height, side), min(profile.width, side)
        return replace(profile, height=height, width=width)

    def _caches(self, component: str) -> bool:
        return component == "unet" and self.feature_cache

    def _graph(self, component: str, file: str, profile: Profile, log: StageLog) -> ComponentEntry:
        from sd_export.wrappers import model_of

        profile = self._traced(component, profile)
        precision = graph_precision(component, self.backends, self.precision)
        made_of = {
            **self._made_of,
            "component": component,
            "feature_cache": self._caches(component),
            "precision": precision,
            "profile": asdict(profile),
            "weights": self._hashes.weights[model_of(component)],
        }
        return recorded_graph(
            self.work,
            component,
            file=file,
            checkpoint=self.checkpoint,
            profile=profile,
            precision=precision,
            feature_cache=self._caches(component),
            key=key_of(made_of),
            log=log,
        )

    def _engines(
        self, component: str, manifest: Manifest, log: StageLog
    ) -> tuple[list[EngineEntry], list[CertificateEntry]]:
        """Engines of all backends, and what was measured of them."""
        from sd_export.calibration import calibration_for  # and numpy, which --help does without

        entry = manifest.components[component]
        profile = self._traced(component, manifest.profile)
        onnx_path = self.work.bundle / entry.file
        engines: list[EngineEntry] = []
        certificate: list[CertificateEntry] = []
        calibration = calibration_for(
            self.precision, self.work.bundle, manifest, self.calibration_prompts
        )
        proof = cache(
            partial(stored_proof, self.work, entry.file, reference_name=self._reference_name())
        )
        if not any(backend in PORTABLE_BACKENDS for backend in self.backends):
            certificate.append(
                recorded_measure(
                    self.work,
                    onnx_path,
                    component=component,
                    entry=entry,
                    profile=profile,
                    versions=self.versions,
                    proof=proof,
                    log=log,
                )
            )
        for backend in self.backends:
            order = EngineOrder(
                backend=backend,
                component=component,
                entry=entry,
                profile=profile,
                precision=engine_precision(
                    component, backend, entry=entry, precision=self.precision
                ),
                calibration=calibration,
            )
            engine, measures = recorded_engine(self.work, order, onnx_path, proof=proof, log=log)
            engines.append(engine)
            certificate += measures
        return engines, certificate

    def _write_record(self) -> dict[str, FileEntry]:
        record = {
            "key": self.key,
            "source": self.checkpoint.source,
            "revision": self.checkpoint.revision,
            **self._hashes.additions,
            "controlnets": [
                {"source": source, "sha256": self._hashes.weights[name]}
                for name, source in self.checkpoint.controlnets.items()
            ],
            "peak_bytes": peak_memory_bytes(),
            "stages": [asdict(event) for event in self.log.ended],
        }
        path = self.work.bundle / RECORD_FILE
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return hash_files(self.work.bundle, [RECORD_FILE])

    def _reference_name(self) -> str:
        return f"diffusers {self.versions['diffusers']}, fp32"


def _with(
    manifest: Manifest,
    component: str,
    entry: ComponentEntry,
    engines: Iterable[EngineEntry],
    certificate: Iterable[CertificateEntry],
) -> Manifest:
    return replace(
        manifest,
        components={**manifest.components, component: entry},
        engines=(*manifest.engines, *engines),
        certificate=(*manifest.certificate, *certificate),
    )
