"""What `bundle.json` says, as frozen dataclasses, and how each is read and written."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sd_engines.errors import BundleError
from sd_engines.node import (
    MANIFEST_NAME,
    REMAKE_HINT,
    Node,
    refuse_constant,
    relative_path,
    unique_object,
    wrong,
)
from sd_engines.spec import BATCH, PICTURES, Defaults, ModelSpec, Precision, Profile, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT_VERSION = 1
BACKENDS = ("tensorrt", "tensorrt-rtx", "openvino", "onnxruntime")
"""Every backend's name, in the order in which ``auto`` tries what it has not measured."""
PORTABLE_BACKENDS = ("openvino", "onnxruntime")
"""Backends that run ONNX itself, whatever their version: the bundle's, or in int8 their own."""

_DTYPES = ("bool", "uint8", "int32", "int64", "float16", "float32")
MAX_MANIFEST_BYTES = 16 << 20
_COMPONENT = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """SHA-256 (hex) and size of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ComponentEntry:
    """One component's ONNX graph: its main file, all its files, and its border."""

    file: str
    files: Mapping[str, FileEntry]
    precision: Precision
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One component made ready for one backend, version and target.

    ``precision`` is what the engine computes in. ``file`` is the component's ONNX unless the engine
    `is_built`. ``flags`` are the build's own settings; ``key`` is `sd_engines.bundle.engine_key`.
    """

    component: str
    backend: str
    version: str
    target: str
    precision: Precision
    file: str
    sha256: str
    bytes: int
    flags: Mapping[str, str]
    key: str

    @property
    def is_built(self) -> bool:
        """Whether ``file`` is its own: a plan, or a graph with 8-bit weights."""
        return self.backend not in PORTABLE_BACKENDS or self.precision == "int8"


@dataclass(frozen=True, kw_only=True)
class CertificateEntry:
    """One measured figure against a reference: it holds where figure and tolerance agree."""

    component: str
    backend: str
    precision: Precision
    reference: str
    metric: str
    figure: float
    tolerance: float
    measured_at: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything in `bundle.json`, in its order."""

    model: ModelSpec
    profile: Profile
    components: Mapping[str, ComponentEntry]
    engines: tuple[EngineEntry, ...] = ()
    certificate: tuple[CertificateEntry, ...] = ()
    files: Mapping[str, FileEntry]
    versions: Mapping[str, str]

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """One picture's latents: channels, height, width."""
        return self.model.latent_channels, self.profile.latent_height, self.profile.latent_width

    def to_json(self) -> str:
        """The text of `bundle.json`; `BundleError` where it would not be read back."""
        try:
            text = json.dumps(
                {"format_version": FORMAT_VERSION, **asdict(self)},
                allow_nan=False,
                ensure_ascii=False,
                indent=2,
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST_NAME}: {error}", REMAKE_HINT) from error
        self.from_json(text)
        return text + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read ``text`` strictly; `BundleError` names the field that is wrong."""
        if len(text) > MAX_MANIFEST_BYTES:
            raise wrong("", f"larger than {MAX_MANIFEST_BYTES} bytes")
        try:
            data = json.loads(text, object_pairs_hook=unique_object, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST_NAME}: not valid JSON: {error}", REMAKE_HINT) from error
        node = Node(data, "")
        version = node.integer("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{MANIFEST_NAME}: format_version {version} is unknown; this is version "
                f"{FORMAT_VERSION}",
                f"Install the sd-toolkit that made it, or make it again. {REMAKE_HINT}",
            )
        manifest = cls(
            model=_model(node.node("model")),
            profile=_profile(node.node("profile")),
            components=node.named("components", _component, _component_name),
            engines=node.entries("engines", _engine),
            certificate=node.entries("certificate", _certificate),
            files=node.named("files", _file, relative_path),
            versions=node.node("versions").texts(),
        )
        node.end()
        _check_consistent(manifest)
        return manifest


def _component_name(text: str, where: str) -> str:
    if not _COMPONENT.fullmatch(text):
        raise wrong(where, f"{text[:200]!r} is no name of a component")
    return text


def _file(node: Node) -> FileEntry:
    entry = FileEntry(sha256=node.sha256("sha256"), bytes=node.integer("bytes"))
    node.end()
    return entry


def _tensor(node: Node) -> TensorSpec:
    spec = TensorSpec(
        name=node.text("name"),
        dtype=node.text("dtype", one_of=_DTYPES),
        shape=tuple(node.array("shape")),
    )
    for axis, size in enumerate(spec.shape):
        symbolic = axis == 0 and size in (BATCH, PICTURES)
        if not (type(size) is int and 0 < size < 2**31) and not symbolic:
            raise wrong(f"{node.where}.shape", f"axis {axis} is {size!r}")
    node.end()
    return spec


def _component(node: Node) -> ComponentEntry:
    entry = ComponentEntry(
        file=node.path("file"),
        files=node.named("files", _file, relative_path),
        precision=node.precision(of_graph=True),
        opset=node.integer("opset", low=1, high=1000),
        inputs=node.entries("inputs", _tensor),
        outputs=node.entries("outputs", _tensor),
    )
    node.end()
    if entry.file not in entry.files:
        raise wrong(f"{node.where}.files", f"does not list {entry.file!r}")
    for border, specs in (("inputs", entry.inputs), ("outputs", entry.outputs)):
        if not specs or len({spec.name for spec in specs}) != len(specs):
            raise wrong(f"{node.where}.{border}", "must hold tensors of different names")
    return entry


def _engine(node: Node) -> EngineEntry:
    entry = EngineEntry(
        component=_component_name(node.text("component"), node.where),
        backend=node.text("backend", one_of=BACKENDS),
        version=node.text("version"),
        target=node.text("target"),
        precision=node.precision(),
        file=node.path("file"),
        sha256=node.sha256("sha256"),
        bytes=node.integer("bytes"),
        flags=node.node("flags").texts(),
        key=node.sha256("key"),
    )
    node.end()
    return entry


def _certificate(node: Node) -> CertificateEntry:
    entry = CertificateEntry(
        component=_component_name(node.text("component"), node.where),
        backend=node.text("backend", one_of=BACKENDS),
        precision=node.precision(),
        reference=node.text("reference"),
        metric=node.text("metric"),
        figure=node.number("figure"),
        tolerance=node.number("tolerance"),
        measured_at=node.text("measured_at"),
    )
    node.end()
    return entry


def _profile(node: Node) -> Profile:
    profile = Profile(
        batch_size=node.integer("batch_size", low=1, high=4096),
        height=node.integer("height", low=1, high=65536),
        width=node.integer("width", low=1, high=65536),
        vae_scale_factor=node.integer("vae_scale_factor", low=1, high=1024),
    )
    node.end()
    if profile.height % profile.vae_scale_factor or profile.width % profile.vae_scale_factor:
        raise wrong(node.where, "height and width must be multiples of vae_scale_factor")
    return profile


def _model(node: Node) -> ModelSpec:
    model = ModelSpec(
        source=node.text("source"),
        revision=node.optional_text("revision"),
        family=node.text("family"),
        license=node.optional_text("license"),
        prediction_type=node.text("prediction_type"),
        latent_channels=node.integer("latent_channels", low=1, high=1024),
        vae_scaling_factor=node.number("vae_scaling_factor"),
        max_prompt_tokens=node.integer("max_prompt_tokens", low=1, high=65536),
        scheduler=node.mapping("scheduler"),
        defaults=_defaults(node.optional_node("defaults")),
        vae=node.younger_text("vae"),
        force_zeros_for_empty_prompt=node.optional_flag("force_zeros_for_empty_prompt"),
        requires_aesthetics_score=node.optional_flag("requires_aesthetics_score"),
        low_res_scheduler=node.younger_mapping("low_res_scheduler"),
        max_noise_level=node.younger_integer("max_noise_level", high=65536),
    )
    node.end()
    return model


def _defaults(node: Node | None) -> Defaults:
    """What the manifest says, or what every bundle drew with before manifests said it."""
    if node is None:
        return Defaults()
    defaults = Defaults(
        num_inference_steps=node.integer("num_inference_steps", low=1),
        guidance_scale=node.number("guidance_scale"),
        strength=node.optional_number("strength", Defaults.strength),
        inpainting_strength=node.optional_number(
            "inpainting_strength", Defaults.inpainting_strength
        ),
    )
    node.end()
    return defaults


def _check_consistent(manifest: Manifest) -> None:
    """Engines refer to components; one that is not built is its component's ONNX."""
    owners = [*manifest.files, *(f for c in manifest.components.values() for f in c.files)]
    built = [e.file for e in manifest.engines if e.is_built]
    if len(set(owners + built)) != len(owners) + len(built):
        raise wrong("", "one file is listed twice")
    for index, engine in enumerate(manifest.engines):
        where = f"engines[{index}]"
        component = manifest.components.get(engine.component)
        if component is None:
            raise wrong(where, f"component {engine.component!r} is not in the bundle")
        if not engine.is_built and (
            engine.file != component.file
            or component.files[engine.file] != FileEntry(sha256=engine.sha256, bytes=engine.bytes)
        ):
            raise wrong(where, f"is not the ONNX of {engine.component!r}")
