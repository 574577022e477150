"""Entries of `bundle.json`: files, components, engines and what was measured of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sd_engines.node import relative_path, wrong
from sd_engines.spec import BATCH, PICTURES, Precision, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sd_engines.node import Node

BACKENDS = ("tensorrt", "tensorrt-rtx", "openvino", "onnxruntime")
"""Every backend's name, in the order in which ``auto`` tries what it has not measured."""
PORTABLE_BACKENDS = ("openvino", "onnxruntime")
"""Backends that run ONNX itself, whatever their version: the bundle's, or in int8 their own."""
_ONNX = ".onnx"

_CAPABILITY = r"sm[1-9][0-9]+[a-z]?"
_TARGETS = {
    "tensorrt": re.compile(rf"{_CAPABILITY}(-[a-z0-9]+)*|sm80\+"),
    "tensorrt-rtx": re.compile(rf"any|{_CAPABILITY}(\+{_CAPABILITY})*"),
    "openvino": re.compile("cpu"),
    "onnxruntime": re.compile("cpu|cuda"),
}
"""What an engine of each backend can be for, as the whole of its ``target``."""
_DTYPES = ("bool", "uint8", "int32", "int64", "float16", "float32")
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

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.bytes for file in self.files.values())

    def graph_for(self, backend: str) -> str:
        """The file that ``backend`` reads: its own form of the graph, where there is one."""
        own = own_graph(self.file, backend)
        return own if own in self.files else self.file


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One component made ready for one backend, version and target.

    ``precision`` is what the engine computes in. ``file`` is the component's ONNX, in the form that
    `ComponentEntry.graph_for` names, unless the engine `is_built`. ``flags`` are the build's own
    settings; ``key`` is `sd_engines.bundle.engine_key`.
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

    @property
    def breadth(self) -> int:
        """The more, the more kinds of machines it is for, at a price: 0 is one model of GPU."""
        if "-" in self.target:
            return 0
        return 3 if self.target == "cpu" else 2 if self.target == "any" or "+" in self.target else 1


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


def own_graph(file: str, backend: str) -> str:
    """What the form that ``backend`` has of the graph ``…/model.onnx`` is called."""
    return f"{file.removesuffix(_ONNX)}.{backend}{_ONNX}"


def component_name(text: str, where: str) -> str:
    """``text``, if it may be the name of a component; `BundleError` at ``where`` if not."""
    if not _COMPONENT.fullmatch(text):
        raise wrong(where, f"{text[:200]!r} is no name of a component")
    return text


def read_file(node: Node) -> FileEntry:
    """A file's entry."""
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


def read_component(node: Node) -> ComponentEntry:
    """A component's entry: one graph."""
    entry = ComponentEntry(
        file=node.path("file"),
        files=node.named("files", read_file, relative_path),
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


def read_engine(node: Node) -> EngineEntry:
    """An engine's entry."""
    entry = EngineEntry(
        component=component_name(node.text("component"), node.where),
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
    if not _TARGETS[entry.backend].fullmatch(entry.target):
        raise wrong(f"{node.where}.target", f"{entry.target!r} is none of {entry.backend}'s")
    return entry


def read_certificate(node: Node) -> CertificateEntry:
    """An entry of the certificate."""
    entry = CertificateEntry(
        component=component_name(node.text("component"), node.where),
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
