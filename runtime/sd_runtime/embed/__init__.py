"""The library for C and C++: ``python -m sd_runtime.embed FOLDER`` builds it.

`library` builds ``libsd_runtime.so`` from ``source/``; inside it `door` answers what programs ask
through ``include/sd_runtime.h``, with a `context.Context` for each open bundle.
"""
