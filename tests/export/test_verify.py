"""An engine is certified for all that it answers, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import pytest

from sd_engines.bundle import ComponentEntry, hash_files, portable_entry
from sd_engines.errors import ExportError
from sd_engines.spec import Profile, TensorSpec
from sd_export.verify import Proof, verify_engine

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sd_engines.bundle import CertificateEntry

    Arrays = dict[str, np.ndarray]

GRAPHS = {
    "unet": """(float[batch, 4] sample) => (float[batch, 4] noise_pred, float[batch, 4] deep) {
        noise_pred = Neg(sample)
        deep = Abs(sample)
    }""",
    "vae_decoder": """(float[batch, 4] latents) => (float[batch, 4] images) {
        images = Sqrt(latents)
    }""",
    "safety_checker": """(float[batch] images) => (bool[batch] nsfw, bool[batch] special) {
        zero = Constant<value = float {0}>()
        nsfw = Greater(images, zero)
        special = Less(images, zero)
    }""",
}
SAMPLE = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)
"""More rows than an engine takes at once."""


def certificate(
    folder: Path, component: str, inputs: Mapping[str, np.ndarray], reference: Arrays
) -> CertificateEntry:
    """What `verify_engine` says of ONNX Runtime's engine of the graph, beside ``reference``."""
    header = '<ir_version: 10, opset_import: ["" : 20]>'
    model = onnx.parser.parse_model(f"{header} {component} {GRAPHS[component]}")
    onnx.save_model(model, folder / "model.onnx")
    inner, outer = (
        tuple(
            TensorSpec(name, str(array.dtype), ("batch", *array.shape[1:]))
            for name, array in arrays.items()
        )
        for arrays in (inputs, reference)
    )
    entry = ComponentEntry(
        file="model.onnx",
        files=hash_files(folder, ["model.onnx"]),
        precision="fp32",
        opset=20,
        inputs=inner,
        outputs=outer,
    )
    profile = Profile(batch_size=1, height=8, width=8, vae_scale_factor=8)
    engine = portable_entry(
        component, entry, profile, "onnxruntime", version="1", target="cpu", precision=None
    )
    proof = Proof(inputs, reference, "numpy")
    return verify_engine(
        folder / "model.onnx", engine, component=entry, profile=profile, proof=proof
    )


@pytest.mark.parametrize("output", ["noise_pred", "deep"])
def test_every_row_of_every_output_is_held_to_the_tolerance(tmp_path: Path, output: str) -> None:
    reference = {"noise_pred": -SAMPLE, "deep": np.abs(SAMPLE)}
    size = np.linalg.norm(SAMPLE)
    reference[output][4, 3] += 5e-5 * size
    measured = certificate(tmp_path, "unet", {"sample": SAMPLE}, reference)
    assert measured.figure == pytest.approx(5e-5, rel=1e-2)
    assert (measured.metric, measured.tolerance) == ("relative_l2", 1e-4)
    reference[output][4, 3] += 1e-4 * size
    with pytest.raises(ExportError, match=r"relative_l2 is 0\.00015 against numpy"):
        certificate(tmp_path, "unet", {"sample": SAMPLE}, reference)


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    reference = {"images": np.sqrt(np.abs(SAMPLE))}
    certificate(tmp_path, "vae_decoder", {"latents": np.abs(SAMPLE)}, reference)
    with pytest.raises(ExportError, match="relative_l2 is inf"):
        certificate(tmp_path, "vae_decoder", {"latents": SAMPLE}, reference)


@pytest.mark.parametrize("output", ["nsfw", "special"])
def test_one_wrong_flag_is_refused(tmp_path: Path, output: str) -> None:
    reference = {"nsfw": SAMPLE[:, 0] > 0, "special": SAMPLE[:, 0] < 0}
    inputs = {"images": SAMPLE[:, 0]}
    measured = certificate(tmp_path, "safety_checker", inputs, reference)
    assert (measured.metric, measured.figure) == ("rows_equal", 1.0)
    reference[output][4] ^= True
    with pytest.raises(ExportError, match=r"rows_equal is 0\.8 against numpy"):
        certificate(tmp_path, "safety_checker", inputs, reference)
