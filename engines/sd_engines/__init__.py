"""Bundles and the engines inside them: the lowest layer, which needs numpy and one backend.

::

    from sd_engines import open_bundle, open_engine

    bundle = open_bundle("bundle")
    with open_engine(bundle, "unet") as unet:
        binding = unet.bind(batch=2, pictures=1)  # fixed buffers, kept; 2 rows share a sample
        binding.inputs["sample"][...] = ...   # written in place
        binding.run()                         # allocates nothing
        binding.outputs["noise_pred"]         # read in place

`errors` draws the exception tree, `manifest` is what `bundle.json` says, and `../README.md` is the
format of a bundle, byte for byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd_engines.bundle import Bundle, open_bundle
    from sd_engines.engine import Binding, Engine, open_engine
    from sd_engines.errors import SdError
    from sd_engines.spec import ModelSpec, Profile, TensorSpec

__all__ = [
    "Binding",
    "Bundle",
    "Engine",
    "ModelSpec",
    "Profile",
    "SdError",
    "TensorSpec",
    "open_bundle",
    "open_engine",
]

_HOMES = {
    "Binding": "engine",
    "Bundle": "bundle",
    "Engine": "engine",
    "ModelSpec": "spec",
    "Profile": "spec",
    "SdError": "errors",
    "TensorSpec": "spec",
    "open_bundle": "bundle",
    "open_engine": "engine",
}


if not TYPE_CHECKING:  # or to its readers any name would be one

    def __getattr__(name: str) -> object:
        """Import a name when it is first used: ``--help`` needs none of them."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
