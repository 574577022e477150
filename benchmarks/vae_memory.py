"""What memory and time a VAE decoder takes for one large picture, whole and by tiles.

``python benchmarks/vae_memory.py CHECKPOINT [--side 2048] [--backend openvino] [--precision bf16]``

Tiles are of the VAE's own size, as ``sd-export --vae-tiling`` makes them. Each way draws the same
random latents once, in a process of its own, which holds nothing else.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from sd_engines.bundle import hash_files
from sd_engines.engine import build_engine, load_engine
from sd_engines.entries import ComponentEntry
from sd_engines.memory import peak_memory_bytes
from sd_engines.spec import Profile
from sd_runtime.tiles import Tiling

if TYPE_CHECKING:
    from sd_engines.spec import Precision

COMPONENT = "vae_decoder"


def make_graph(model: str, folder: Path, side: int | None) -> tuple[ComponentEntry, Profile]:
    """The decoder of ``model`` for squares of ``side`` pixels (None: its own), in ``folder``."""
    from sd_export.borders import borders
    from sd_export.load import load_model
    from sd_export.onnx_export import OPSET, save, trace
    from sd_export.source import find_checkpoint
    from sd_export.wrappers import wrap

    checkpoint = find_checkpoint(model)
    side = side or int(checkpoint.configs["vae"]["sample_size"])
    factor = checkpoint.vae_scale_factor
    profile = Profile(batch_size=1, height=side, width=side, vae_scale_factor=factor)
    inputs, outputs = borders(COMPONENT, checkpoint=checkpoint, profile=profile)
    module = wrap(COMPONENT, load_model(checkpoint, "vae"), checkpoint=checkpoint, profile=profile)
    graph = trace(module, component=COMPONENT, inputs=inputs, outputs=outputs)
    folder.mkdir()
    files = hash_files(folder, [path.name for path in save(graph, folder)])
    entry = ComponentEntry(
        file="model.onnx",
        files=files,
        precision="fp32",
        opset=OPSET,
        inputs=inputs,
        outputs=outputs,
    )
    return entry, profile


def decode(
    folder: Path,
    entry: ComponentEntry,
    profile: Profile,
    whole: Profile,
    backend: str,
    precision: Precision,
) -> tuple[int, float]:
    """Peak memory in bytes and seconds of one picture of ``whole``, by tiles of ``profile``."""
    engine = build_engine(
        backend,
        folder / entry.file,
        output_dir=folder,
        component=COMPONENT,
        entry=entry,
        profile=profile,
        precision=precision,
    )
    high, wide = profile.latent_height, profile.latent_width
    tiling = Tiling(whole.latent_height, whole.latent_width, high, wide)
    shape = (1, int(entry.inputs[0].shape[1]), whole.latent_height, whole.latent_width)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    with load_engine(folder / entry.file, component=entry, engine=engine, max_batch=1) as decoder:
        binding = decoder.bind(1)
        began = perf_counter()
        drawn = []
        for top, left in tiling.tiles:
            binding.inputs["latents"][...] = latents[:, :, top : top + high, left : left + wide]
            binding.run()
            drawn.append(binding.outputs["images"][0].copy())
        tiling.join(np.stack(drawn))
        return peak_memory_bytes(), perf_counter() - began


def main() -> None:
    """Measure both ways, and print a line of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--side", type=int, default=2048, help="Of the square picture, in pixels.")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision", default="bf16")
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        graphs = {}
        for name, side in (("whole", arguments.side), ("tiles", None)):
            folder = Path(temporary, name)
            graphs[name] = folder, *make_graph(arguments.checkpoint, folder, side)
        whole = graphs["whole"][2]
        how = arguments.backend, arguments.precision
        for name, graph in graphs.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                peak, seconds = pool.submit(decode, *graph, whole, *how).result()
            print(f"{name:<6} {peak / 1e9:6.2f} GB {seconds:8.1f} s", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
