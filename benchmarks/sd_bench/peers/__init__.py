"""Other programs that draw with the same checkpoint, measured side by side with a bundle.

Each runs in a process, and where its pins conflict in an environment, of its own; a worker script
of ``benchmarks/peers`` answers for it, one JSON object a line.
"""
