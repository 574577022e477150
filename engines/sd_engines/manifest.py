"""What `bundle.json` says, as frozen dataclasses, and the strict reader that makes them.

A bundle may come from a stranger, so the reader takes nothing on trust: every field must be
there, be of its type and within its range; no field may be unknown; no path may leave the folder.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from sd_engines.errors import BundleError
from sd_engines.spec import BATCH, ModelSpec, Precision, Profile, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FORMAT_VERSION = 1
MANIFEST_NAME = "bundle.json"
BACKENDS = ("tensorrt", "tensorrt-rtx", "openvino", "onnxruntime")
"""Every backend's name, in the order in which ``auto`` tries what it has not measured."""
PORTABLE_BACKENDS = ("openvino", "onnxruntime")
"""Backends that run the bundle's ONNX itself, whatever their version."""
REMAKE_HINT = "Make the bundle again: sd-export --model MODEL --output BUNDLE"

_T = TypeVar("_T")
_DTYPES = ("bool", "uint8", "int32", "int64", "float16", "float32")
MAX_MANIFEST_BYTES = 16 << 20
_COMPONENT = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


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

    ``precision`` is what the engine computes in. ``file`` is the component's ONNX for a portable
    backend. ``flags`` are the build's own settings; ``key`` is `sd_engines.bundle.engine_key`.
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
            raise _wrong("", f"larger than {MAX_MANIFEST_BYTES} bytes")
        try:
            data = json.loads(
                text, object_pairs_hook=_unique_object, parse_constant=_refuse_constant
            )
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST_NAME}: not valid JSON: {error}", REMAKE_HINT) from error
        node = _Node(data, "")
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
            files=node.named("files", _file, _path),
            versions=node.node("versions").texts(),
        )
        node.end()
        _check_consistent(manifest)
        return manifest


class _Node:
    """One JSON object being read: each field is taken once, with its type and range."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(where, "must be an object")
        self._fields: dict[str, Any] = dict(value)
        self.where = where

    def _at(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _take(self, key: str) -> Any:
        if key not in self._fields:
            raise _wrong(self._at(key), "is missing")
        return self._fields.pop(key)

    def text(self, key: str, *, one_of: tuple[str, ...] | None = None) -> str:
        value = self._take(key)
        if not isinstance(value, str) or not value:
            raise _wrong(self._at(key), "must be a text that is not empty")
        if _UNPRINTABLE.search(value):
            raise _wrong(self._at(key), "holds control characters")
        if one_of is not None and value not in one_of:
            raise _wrong(self._at(key), f"{value!r} is none of {', '.join(one_of)}")
        return value

    def optional_text(self, key: str) -> str | None:
        if self._fields.get(key, "") is None:
            self._take(key)
            return None
        return self.text(key)

    def precision(self) -> Precision:
        value: Precision = self.text("precision", one_of=get_args(Precision))  # type: ignore[assignment]
        return value

    def integer(self, key: str, *, low: int = 0, high: int = 2**53) -> int:
        value = self._take(key)
        if type(value) is not int or not low <= value <= high:
            raise _wrong(self._at(key), f"must be a whole number from {low} to {high}")
        return value

    def number(self, key: str) -> float:
        value = self._take(key)
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        raise _wrong(self._at(key), "must be a finite number")

    def sha256(self, key: str) -> str:
        value = self.text(key)
        if not _SHA256.fullmatch(value):
            raise _wrong(self._at(key), "must be 64 lower-case hexadecimal digits")
        return value

    def path(self, key: str) -> str:
        return _path(self.text(key), self._at(key))

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._take(key)
        if not isinstance(value, dict):
            raise _wrong(self._at(key), "must be an object")
        return value

    def array(self, key: str) -> list[Any]:
        value = self._take(key)
        if not isinstance(value, list):
            raise _wrong(self._at(key), "must be an array")
        return value

    def node(self, key: str) -> _Node:
        return _Node(self._take(key), self._at(key))

    def entries(self, key: str, read: Callable[[_Node], _T]) -> tuple[_T, ...]:
        where = self._at(key)
        return tuple(read(_Node(v, f"{where}[{i}]")) for i, v in enumerate(self.array(key)))

    def named(
        self, key: str, read: Callable[[_Node], _T], check_name: Callable[[str, str], str]
    ) -> dict[str, _T]:
        where = self._at(key)
        return {
            check_name(name, where): read(_Node(value, f"{where}.{name}"))
            for name, value in self.mapping(key).items()
        }

    def texts(self) -> dict[str, str]:
        return {key: self.text(key) for key in tuple(self._fields)}

    def end(self) -> None:
        if self._fields:
            raise _wrong(self._at(next(iter(self._fields))), "is unknown")


def _wrong(where: str, problem: str) -> BundleError:
    where = where if where.isprintable() else ascii(where)
    where = where if len(where) <= 300 else where[:300] + "…"
    return BundleError(": ".join(filter(None, (MANIFEST_NAME, where, problem))), REMAKE_HINT)


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object names one field twice")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _path(text: str, where: str) -> str:
    """A relative POSIX path in its one normal form that stays inside the folder."""
    parts = text.split("/")
    if (
        _UNPRINTABLE.search(text)
        or "\\" in text
        or len(text) > 1024
        or any(part in ("", ".", "..") or len(part) > 255 for part in parts)
        or ":" in parts[0]
        or PurePosixPath(text).is_absolute()
        or text == MANIFEST_NAME
    ):
        raise _wrong(where, f"{text[:200]!r} is no path of a file inside the bundle")
    return text


def _component_name(text: str, where: str) -> str:
    if not _COMPONENT.fullmatch(text):
        raise _wrong(where, f"{text[:200]!r} is no name of a component")
    return text


def _file(node: _Node) -> FileEntry:
    entry = FileEntry(sha256=node.sha256("sha256"), bytes=node.integer("bytes"))
    node.end()
    return entry


def _tensor(node: _Node) -> TensorSpec:
    spec = TensorSpec(
        name=node.text("name"),
        dtype=node.text("dtype", one_of=_DTYPES),
        shape=tuple(node.array("shape")),
    )
    for axis, size in enumerate(spec.shape):
        if not (type(size) is int and 0 < size < 2**31) and not (axis == 0 and size == BATCH):
            raise _wrong(f"{node.where}.shape", f"axis {axis} is {size!r}")
    node.end()
    return spec


def _component(node: _Node) -> ComponentEntry:
    entry = ComponentEntry(
        file=node.path("file"),
        files=node.named("files", _file, _path),
        precision=node.precision(),
        opset=node.integer("opset", low=1, high=1000),
        inputs=node.entries("inputs", _tensor),
        outputs=node.entries("outputs", _tensor),
    )
    node.end()
    if entry.file not in entry.files:
        raise _wrong(f"{node.where}.files", f"does not list {entry.file!r}")
    for border, specs in (("inputs", entry.inputs), ("outputs", entry.outputs)):
        if not specs or len({spec.name for spec in specs}) != len(specs):
            raise _wrong(f"{node.where}.{border}", "must hold tensors of different names")
    return entry


def _engine(node: _Node) -> EngineEntry:
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


def _certificate(node: _Node) -> CertificateEntry:
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


def _profile(node: _Node) -> Profile:
    profile = Profile(
        batch_size=node.integer("batch_size", low=1, high=4096),
        height=node.integer("height", low=1, high=65536),
        width=node.integer("width", low=1, high=65536),
        vae_scale_factor=node.integer("vae_scale_factor", low=1, high=1024),
    )
    node.end()
    if profile.height % profile.vae_scale_factor or profile.width % profile.vae_scale_factor:
        raise _wrong(node.where, "height and width must be multiples of vae_scale_factor")
    return profile


def _model(node: _Node) -> ModelSpec:
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
    )
    node.end()
    return model


def _check_consistent(manifest: Manifest) -> None:
    """Engines refer to components; a portable engine is its component's ONNX, a built one not."""
    owners = [*manifest.files, *(f for c in manifest.components.values() for f in c.files)]
    built = [e.file for e in manifest.engines if e.backend not in PORTABLE_BACKENDS]
    if len(set(owners + built)) != len(owners) + len(built):
        raise _wrong("", "one file is listed twice")
    for index, engine in enumerate(manifest.engines):
        where = f"engines[{index}]"
        component = manifest.components.get(engine.component)
        if component is None:
            raise _wrong(where, f"component {engine.component!r} is not in the bundle")
        if engine.backend in PORTABLE_BACKENDS and (
            engine.file != component.file
            or component.files[engine.file] != FileEntry(sha256=engine.sha256, bytes=engine.bytes)
        ):
            raise _wrong(where, f"is not the ONNX of {engine.component!r}")
