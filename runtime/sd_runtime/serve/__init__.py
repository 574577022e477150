"""``sd-serve``: bundles behind HTTP. Several doors, one engine room: `EngineRoom`.

Nothing else of `sd_runtime` imports this package, which alone needs the extra ``serve``.
"""
