"""What `bundle.json` says, as frozen dataclasses, and how each is read and written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

from sd_engines.entries import (
    FileEntry,
    component_name,
    read_certificate,
    read_component,
    read_engine,
    read_file,
)
from sd_engines.errors import BundleError, ConfigError
from sd_engines.node import (
    MANIFEST_NAME,
    REMAKE_HINT,
    Node,
    check_depth,
    refuse_constant,
    relative_path,
    unique_object,
    wrong,
)
from sd_engines.shape_check import check_shapes
from sd_engines.spec import MAX_TRAIN_TIMESTEPS, Defaults, ModelSpec, Profile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sd_engines.entries import CertificateEntry, ComponentEntry, EngineEntry

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 16 << 20
_TRAIN_TIMESTEPS = 1000
"""A scheduler's ``num_train_timesteps`` where its configuration says nothing, as in diffusers."""


@dataclass(frozen=True, kw_only=True)
class SizeEntry:
    """What a bundle has for one more size of pictures, as `Manifest` has for its own.

    A component whose graph is the same at both sizes is listed in both, with its engines.
    """

    profile: Profile
    components: Mapping[str, ComponentEntry]
    engines: tuple[EngineEntry, ...] = ()
    certificate: tuple[CertificateEntry, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything in `bundle.json`, in its order."""

    model: ModelSpec
    profile: Profile
    components: Mapping[str, ComponentEntry]
    engines: tuple[EngineEntry, ...] = ()
    certificate: tuple[CertificateEntry, ...] = ()
    sizes: tuple[SizeEntry, ...] = ()
    files: Mapping[str, FileEntry]
    versions: Mapping[str, str]

    @property
    def all_sizes(self) -> tuple[SizeEntry, ...]:
        """Every size of pictures that the bundle draws, its own first."""
        own = {field.name: getattr(self, field.name) for field in fields(SizeEntry)}
        return SizeEntry(**own), *self.sizes

    def at(self, height: int | None, width: int | None) -> Manifest:
        """The same bundle with the size ``height``×``width`` as its own, in pixels; None: as it is.

        What was its own takes the other's place. `ConfigError` where the bundle was not built for
        that size.
        """
        height, width = height or self.profile.height, width or self.profile.width
        if (height, width) == (self.profile.height, self.profile.width):
            return self
        for index, size in enumerate(self.sizes):
            if (size.profile.height, size.profile.width) == (height, width):
                given = {field.name: getattr(size, field.name) for field in fields(SizeEntry)}
                own, *others = self.all_sizes
                others[index] = own
                return replace(self, **given, sizes=tuple(others))
        sizes = [size.profile for size in self.all_sizes]
        built = ", ".join(f"{profile.height}×{profile.width}" for profile in sizes)
        hint = "Take one of these" if self.sizes else "Leave the size out"
        if height % 8 or width % 8:
            hint += "; none can be drawn whose sides are no multiples of 8."
        else:
            hint += (
                f", or export another bundle: sd-export --model {self.model.source} "
                f"--size {width}x{height} --output BUNDLE."
            )
        raise ConfigError(f"the bundle draws {built} (height × width), not {height}×{width}", hint)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the pictures: the hashes of all graphs and other files.

        Of the graphs of its own size, where it has more. Engines added later, certificates and
        dates leave it as it is.
        """
        hashes = {name: entry.sha256 for name, entry in self.files.items()}
        for component in self.components.values():
            hashes.update({name: entry.sha256 for name, entry in component.files.items()})
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

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
        text += "\n"
        self.from_json(text)
        return text

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read ``text`` strictly; `BundleError` names the field that is wrong."""
        try:
            data = text.encode() if isinstance(text, str) else text
            if len(data) > MAX_MANIFEST_BYTES:
                raise wrong("", f"larger than {MAX_MANIFEST_BYTES} bytes")
            check_depth(decoded := data.decode())
            value = json.loads(
                decoded, object_pairs_hook=unique_object, parse_constant=refuse_constant
            )
        except ValueError as error:
            raise BundleError(f"{MANIFEST_NAME}: not valid JSON: {error}", REMAKE_HINT) from error
        node = Node(value, "")
        version = node.integer("format_version")
        if version != FORMAT_VERSION:
            raise wrong("format_version", f"{version} is unknown; this is version {FORMAT_VERSION}")
        manifest = cls(
            model=_model(node.node("model")),
            profile=_profile(node.node("profile")),
            components=node.named("components", read_component, component_name),
            engines=node.entries("engines", read_engine),
            certificate=node.entries("certificate", read_certificate),
            sizes=node.younger_entries("sizes", _size),
            files=node.named("files", read_file, relative_path),
            versions=node.node("versions").texts(),
        )
        node.end()
        _check_consistent(manifest)
        return manifest


def _size(node: Node) -> SizeEntry:
    entry = SizeEntry(
        profile=_profile(node.node("profile")),
        components=node.named("components", read_component, component_name),
        engines=node.entries("engines", read_engine),
        certificate=node.entries("certificate", read_certificate),
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
        revision=node.nullable_text("revision"),
        family=node.text("family"),
        license=node.nullable_text("license"),
        prediction_type=node.text("prediction_type"),
        latent_channels=node.integer("latent_channels", low=1, high=1024),
        vae_scaling_factor=node.number("vae_scaling_factor"),
        max_prompt_tokens=node.integer("max_prompt_tokens", low=1, high=65536),
        scheduler=node.mapping("scheduler"),
        defaults=_defaults(node.younger_node("defaults")),
        vae=node.younger_nullable_text("vae"),
        force_zeros_for_empty_prompt=node.younger_flag("force_zeros_for_empty_prompt"),
        requires_aesthetics_score=node.younger_flag("requires_aesthetics_score"),
        low_res_scheduler=node.younger_nullable_mapping("low_res_scheduler"),
        max_noise_level=node.younger_nullable_integer("max_noise_level", high=65536),
        controlnets=node.younger_texts("controlnets"),
    )
    node.end()
    _check_schedulers(model, node.where)
    return model


def _check_schedulers(model: ModelSpec, where: str) -> None:
    """That ``scheduler`` has a class, and both a length; what else they say is the sampler's."""
    Node(model.scheduler, f"{where}.scheduler").text("_class_name")
    for name, config in (
        ("scheduler", model.scheduler),
        ("low_res_scheduler", model.low_res_scheduler or {}),
    ):
        if "num_train_timesteps" in config:
            length = Node(config, f"{where}.{name}")
            length.integer("num_train_timesteps", low=1, high=MAX_TRAIN_TIMESTEPS)
    most = model.scheduler.get("num_train_timesteps", _TRAIN_TIMESTEPS)
    if model.defaults.num_inference_steps > most:
        raise wrong(
            f"{where}.defaults.num_inference_steps",
            f"must be a whole number from 1 to the scheduler's num_train_timesteps, {most}",
        )


def _defaults(node: Node | None) -> Defaults:
    """What the manifest says, or what every bundle drew with before manifests said it."""
    if node is None:
        return Defaults()
    defaults = Defaults(
        num_inference_steps=node.integer("num_inference_steps", low=1),
        guidance_scale=node.number("guidance_scale"),
        strength=node.younger_share("strength", Defaults.strength),
        inpainting_strength=node.younger_share("inpainting_strength", Defaults.inpainting_strength),
    )
    node.end()
    return defaults


def _check_consistent(manifest: Manifest) -> None:
    """Sizes differ in nothing else, files are listed once or alike in several, and shapes agree."""
    listed: dict[str, FileEntry] = {}
    for index, size in enumerate(manifest.all_sizes):
        where = f"sizes[{index - 1}]" if index else ""
        if size.components.keys() != manifest.components.keys():
            raise wrong(where, "has other components than the bundle")
        own, theirs = manifest.profile, size.profile
        if theirs != replace(own, height=theirs.height, width=theirs.width):
            raise wrong(where, "differs in more than height and width from the bundle's profile")
        check_shapes(manifest.model, size, where)
        for name, entry in _files_of(size, where).items():
            if name in manifest.files or listed.setdefault(name, entry) != entry:
                raise wrong(where, f"{name!r} is listed twice")
    if len({size.profile for size in manifest.all_sizes}) != len(manifest.all_sizes):
        raise wrong("sizes", "one size is listed twice")


def _files_of(size: SizeEntry, where: str) -> dict[str, FileEntry]:
    """Files of components and engines; engines must be of those, one that is not built its ONNX."""
    files: dict[str, FileEntry] = {}
    for component in size.components.values():
        for name, entry in component.files.items():
            _list(name, entry, files, where)
    for index, engine in enumerate(size.engines):
        at = f"{where}.engines[{index}]" if where else f"engines[{index}]"
        entry = FileEntry(sha256=engine.sha256, bytes=engine.bytes)
        graph = size.components.get(engine.component)
        if graph is None:
            raise wrong(at, f"component {engine.component!r} is not in the bundle")
        if engine.is_built:
            _list(engine.file, entry, files, where)
        elif (
            engine.file not in (graph.file, graph.graph_for(engine.backend))
            or files[engine.file] != entry
        ):
            raise wrong(at, f"{engine.file!r} is not the ONNX of {engine.component!r}")
    return files


def _list(name: str, entry: FileEntry, files: dict[str, FileEntry], where: str) -> None:
    if name in files:
        raise wrong(where, f"{name!r} is listed twice")
    files[name] = entry
